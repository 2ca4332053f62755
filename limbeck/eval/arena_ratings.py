"""Bradley-Terry ratings from pairwise votes (Bradley and Terry 1952), as in Chatbot Arena (arXiv 2403.04132).

P(a is preferred to b) = sigmoid(s_a - s_b + style), a tie being half a win for either. Ratings are on the
scale of chess: 400 points are odds of ten to one, and 1000 is the mean of the models compared. Votes of
people and votes of judges are never rated together.

Legend: V rows of the regression (distinct votes, then the prior's ties), P pairs of models, S style
properties, X coefficients (models, then style properties).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from .statistics import Z

# outcome -> wins of the answer on side A; both bad is a tie
WORTH = {"a": 1.0, "tie": 0.5, "bad": 0.5, "b": 0.0}
POINTS = 400 / math.log(10)  # rating points a unit of strength (natural log of the odds)
MIDDLE = 1000.0  # rating points: the mean of all models
TOLERANCE = 1e-10  # of strengths: evalica stops below it
MAX_ITERATIONS = 10_000  # of evalica's fit
GRADIENT_TOLERANCE = 1e-9  # of the loss: scipy stops below it
STYLE = ("length", "headers", "lists", "bold")
CONTROLS = {"": (), "length": STYLE[:1], "style": STYLE}
_MARKS = {
    "headers": re.compile(r"^ {0,3}#{1,6} ", re.MULTILINE),
    "lists": re.compile(r"^\s*(?:[-*+]|\d{1,3}[.)]) ", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
}


@dataclass(frozen=True)
class Vote:
    """One vote: `Vote("r1", "small", "a", voter="Mei")` prefers r1's answer, which was shown on side A.

    `outcome` is `a`, `b`, `tie`, `bad` (both answers are bad), or empty where a judge abstained. `style`
    holds, for each property of `STYLE`, (A - B) / (A + B). `seconds` is the time from the answers to the
    vote, `when` is Unix time.
    """

    a: str
    b: str
    outcome: Literal["a", "b", "tie", "bad", ""]
    voter: str
    judge: bool = False
    language: str = "en"
    style: tuple[float, ...] = (0.0,) * len(STYLE)
    battle: str = ""
    seconds: float | None = None
    when: float = 0.0


@dataclass(frozen=True)
class Rating:
    """A model's rating: `Rating("r1", 1042.0, 1017.3, 1066.7, rank=1, votes=212, share=.56)`.

    `low` and `high` are the ends of its 95 % interval; `rank` is one more than the number of models that are
    significantly better (the interval of the difference is above 0); `share` counts wins and half of the
    ties.
    """

    model: str
    rating: float
    low: float
    high: float
    rank: int
    votes: int
    share: float


@dataclass(frozen=True)
class Ratings:
    """Ratings of all models, best first.

    `style` holds, for each property controlled for, the points gained by one standard deviation of it, and
    the interval.
    """

    models: tuple[Rating, ...]
    style: dict[str, tuple[float, float, float]]
    votes: int

    def of(self, model: str) -> Rating | None:
        """The rating of a model; None if it has no votes."""
        return next((rating for rating in self.models if rating.model == model), None)


def rate(votes: Iterable[Vote], control: Literal["", "length", "style"] = "") -> Ratings:
    """Ratings of the models in these votes. Raises ValueError if votes of people and of judges are mixed.

    Each model has one tie added as a prior, spread over all others: half a win and half a loss. That keeps an
    unbeaten model finite and, for two models, is Firth's correction of the bias of few votes (1993,
    Biometrika 80:27). Intervals come from the sandwich estimator (arXiv 2403.04132, section 5), which ties
    make narrower, as they should. With `control`, the gain of an answer by its length or style is estimated
    beside the strengths and kept out of them.
    """
    votes = [vote for vote in votes if vote.outcome in WORTH]
    if not votes:
        return Ratings((), {}, 0)
    if len({vote.judge for vote in votes}) > 1:
        raise ValueError("votes of people and votes of judges are rated apart")
    models = {vote.a for vote in votes} | {vote.b for vote in votes}
    table = _Regression(votes, sorted(models), CONTROLS[control])
    fitted_X = _fit_with_style(table) if control else _fit(table)
    return _to_ratings(table, fitted_X, _covariance(table, fitted_X))


def draw_pair(models: Sequence[str], votes: Iterable[Vote], dice: np.random.Generator) -> tuple[str, str]:
    """Two of the models for the next battle, on random sides.

    The probability of a pair is proportional to the amount by which one more vote would narrow its interval
    (arXiv 2403.04132, eq. 9): new and even pairs are drawn most often, decided ones seldom.
    """
    pairs = list(combinations(sorted(models), 2))
    battles, wins = _count_pairs(votes)
    count_P = np.array([battles[pair] + 1.0 for pair in pairs])
    wins_P = np.array([wins[pair] + 0.5 for pair in pairs])
    share_P = wins_P / count_P
    deviation_P = np.sqrt(share_P * (1 - share_P))
    gain_P = deviation_P * (count_P**-0.5 - (count_P + 1) ** -0.5)
    first, second = pairs[dice.choice(len(pairs), p=gain_P / gain_P.sum())]
    return (first, second) if dice.random() < 0.5 else (second, first)


def _count_pairs(votes: Iterable[Vote]) -> tuple[Counter, Counter]:
    """Battles of each pair of models (in alphabetical order), and wins of its first model."""
    battles = Counter()
    wins = Counter()
    for vote in votes:
        if vote.outcome not in WORTH or vote.a == vote.b:
            continue
        pair = tuple(sorted((vote.a, vote.b)))
        worth = WORTH[vote.outcome]
        battles[pair] += 1
        wins[pair] += worth if vote.a == pair[0] else 1 - worth
    return battles, wins


def style_of(a: str, b: str) -> tuple[float, ...]:
    """The differences (A - B) / (A + B) of two answers in characters, headers, list items and bold spans.

    >>> style_of("four", "**four** is the answer")
    (-0.6923076923076923, 0.0, 0.0, -1.0)
    """
    differences = []
    for x, y in zip(_count_marks(a), _count_marks(b), strict=True):
        total = x + y
        differences.append((x - y) / total if total else 0.0)
    return tuple(differences)


def _count_marks(text: str) -> list[int]:
    """One count for each property of STYLE."""
    counts = [len(text)]
    for mark in _MARKS.values():
        counts.append(len(mark.findall(text)))
    return counts


# ---------------------------------------------------------------- fitting


class _Regression:
    """Votes as rows of a logistic regression: `design_VX`, `worth_V` (wins of side A), `weight_V`.

    Equal votes are one row with their number as its weight. The prior's ties follow, each as half a win and
    half a loss.
    """

    def __init__(self, votes: Sequence[Vote], models: Sequence[str], style: Sequence[str]):
        """Build the rows; `style` names the properties controlled for."""
        self.models = models
        self.style = style
        self.cells = Counter(_cell(vote, len(style)) for vote in votes)
        self.pairs = list(combinations(models, 2))
        self.tie_weight = 1 / (len(models) - 1)
        self.worth_V = np.array(self._worths())
        self.weight_V = np.array(self._weights())
        columns = len(models) + len(style)
        self.design_VX = np.zeros((len(self.weight_V), columns))
        self._set_sides()
        self._set_style()
        # strengths are fixed at mean 0; a style coefficient is a draw from N(0, 1), or few votes could send
        # it anywhere
        strengths_X = np.zeros(columns)
        strengths_X[: len(models)] = 1.0
        self.prior_XX = np.outer(strengths_X, strengths_X) + np.diag(1 - strengths_X)

    def _worths(self) -> list[float]:
        """Wins of side A in each row."""
        worths = [worth for _, _, worth, _ in self.cells]
        wins = [1.0] * len(self.pairs)
        losses = [0.0] * len(self.pairs)
        return worths + wins + losses

    def _weights(self) -> list[float]:
        """The weight of each row."""
        counts = [float(count) for count in self.cells.values()]
        halves = [self.tie_weight / 2] * (2 * len(self.pairs))
        return counts + halves

    def _set_sides(self) -> None:
        """Write 1 in each row for the model on side A and -1 for the model on side B."""
        column = {model: i for i, model in enumerate(self.models)}
        sides = [(a, b) for a, b, _, _ in self.cells]
        sides += self.pairs + self.pairs
        for row, (a, b) in enumerate(sides):
            self.design_VX[row, column[a]] = 1.0
            self.design_VX[row, column[b]] = -1.0

    def _set_style(self) -> None:
        """Write the style columns, scaled to one standard deviation.

        They are not centred, so that swapping the sides of a battle changes nothing.
        """
        rows = len(self.cells)
        style = [properties for *_, properties in self.cells]
        style_VS = np.array(style).reshape(rows, len(self.style))
        variance_S = np.average(style_VS**2, axis=0, weights=self.weight_V[:rows])
        deviation_S = np.sqrt(variance_S)
        scale_S = np.where(deviation_S > 0, deviation_S, 1.0)
        self.design_VX[:rows, len(self.models) :] = style_VS / scale_S

    def count_wins(self, model: str) -> tuple[int, float]:
        """A model's votes, and its share of them: wins, and half of the ties."""
        votes = 0
        wins = 0
        for (a, b, worth, _), count in self.cells.items():
            if model in (a, b):
                votes += count
                wins += count * (worth if a == model else 1 - worth)
        return votes, wins / votes


def _cell(vote: Vote, properties: int) -> tuple[str, str, float, tuple[float, ...]]:
    """The part of a vote that its row depends on, with the first `properties` of its style."""
    return vote.a, vote.b, WORTH[vote.outcome], vote.style[:properties]


def _fit(table: _Regression) -> np.ndarray:
    """Strengths [X] by evalica, without style, on the same rows."""
    import evalica

    winner_of = {1.0: evalica.Winner.X, 0.5: evalica.Winner.Draw, 0.0: evalica.Winner.Y}
    rows = []
    for (a, b, worth, _), count in table.cells.items():
        rows.append((a, b, winner_of[worth], float(count)))
    for a, b in table.pairs:
        rows.append((a, b, evalica.Winner.Draw, table.tie_weight))
    xs, ys, winners, weights = zip(*rows, strict=True)
    stop = {"tolerance": TOLERANCE, "limit": MAX_ITERATIONS}
    fitted = evalica.bradley_terry(xs, ys, winners, weights=list(weights), **stop)
    strengths_X = np.log([fitted.scores[model] for model in table.models])
    return strengths_X - strengths_X.mean()


def _fit_with_style(table: _Regression) -> np.ndarray:
    """Strengths and style coefficients together, [X]."""
    from scipy.optimize import minimize
    from scipy.special import expit

    design_VX = table.design_VX
    worth_V = table.worth_V
    weight_V = table.weight_V
    prior_XX = table.prior_XX

    def loss(x_X: np.ndarray) -> float:
        """The negative log-likelihood of coefficients [X], and the prior's penalty."""
        logit_V = design_VX @ x_X
        nll_V = np.logaddexp(0, logit_V) - worth_V * logit_V
        penalty = x_X @ prior_XX @ x_X / 2
        return weight_V @ nll_V + penalty

    def gradient(x_X: np.ndarray) -> np.ndarray:
        """The gradient [X]."""
        residual_V = expit(design_VX @ x_X) - worth_V
        return design_VX.T @ (weight_V * residual_V) + prior_XX @ x_X

    def hessian(x_X: np.ndarray) -> np.ndarray:
        """The second derivatives [X, X]."""
        return _hessian(table, expit(design_VX @ x_X))

    start_X = np.zeros(design_VX.shape[1])
    options = {"gtol": GRADIENT_TOLERANCE}
    return minimize(loss, start_X, jac=gradient, hess=hessian, method="trust-exact", options=options).x


def _hessian(table: _Regression, chance_V: np.ndarray) -> np.ndarray:
    """Second derivatives [X, X] of the loss where side A wins with probability `chance_V`."""
    design_VX = table.design_VX
    variance_V = table.weight_V * chance_V * (1 - chance_V)
    return (design_VX.T * variance_V) @ design_VX + table.prior_XX


def _covariance(table: _Regression, fitted_X: np.ndarray) -> np.ndarray:
    """Covariance [X, X] of the coefficients by the sandwich estimator: bread, meat, bread (Huber 1967)."""
    from scipy.special import expit

    design_VX = table.design_VX
    chance_V = expit(design_VX @ fitted_X)
    bread_XX = np.linalg.inv(_hessian(table, chance_V))
    residual_V = table.worth_V - chance_V
    squares_V = table.weight_V * residual_V**2
    meat_XX = (design_VX.T * squares_V) @ design_VX
    return bread_XX @ meat_XX @ bread_XX


def _to_ratings(table: _Regression, fitted_X: np.ndarray, covariance_XX: np.ndarray) -> Ratings:
    """Ratings in points, best first."""
    models = len(table.models)
    error_X = Z * np.sqrt(np.diag(covariance_XX))
    intervals = [_interval(*coefficient) for coefficient in zip(fitted_X, error_X, strict=True)]
    ratings = []
    for i, model in enumerate(table.models):
        points = [float(MIDDLE + x) for x in intervals[i]]
        rank = _rank(i, fitted_X, covariance_XX, models)
        votes, share = table.count_wins(model)
        ratings.append(Rating(model, *points, rank, votes, share))
    ratings.sort(key=lambda rating: -rating.rating)
    style = {}
    for name, points in zip(table.style, intervals[models:], strict=True):
        style[name] = tuple(float(x) for x in points)
    return Ratings(tuple(ratings), style, table.cells.total())


def _interval(coefficient: float, error: float) -> list[float]:
    """A coefficient and the ends of its interval, in rating points."""
    ends = (coefficient + side * error for side in (0, -1, 1))
    return [POINTS * end for end in ends]


def _rank(i: int, fitted_X: np.ndarray, covariance_XX: np.ndarray, models: int) -> int:
    """One more than the number of models that are significantly better than model `i`."""
    rank = 1
    for j in range(models):
        if j == i:
            continue
        variance = covariance_XX[i, i] + covariance_XX[j, j] - 2 * covariance_XX[i, j]
        variance = max(variance, 0.0)
        error = math.sqrt(variance)
        if fitted_X[j] - fitted_X[i] > Z * error:
            rank += 1
    return rank
