"""Bradley-Terry ratings from pairwise votes (Bradley and Terry 1952), as in Chatbot Arena (arXiv
2403.04132).

P(a is preferred to b) = sigmoid(s_a - s_b + style), where s is the strength of a model and style the effect
of the answers' length and formatting. A tie is half a win for either side. Ratings are on the scale of
chess: 400 points are odds of ten to one, and 1000 is the mean of the models compared. Votes of people and
votes of judges (models that compare answers) are never rated together.

Dimensions: V rows of the regression (distinct votes, then the ties of the prior) · P pairs of models · S
style properties · X coefficients (strengths of the models, then style properties)."""

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
    """One vote: `Vote("r1", "small", "a", voter="Mei")` prefers the answer of the model r1, which was shown
    on side A.

    `a` and `b` are the models on the two sides. `outcome` is `a`, `b`, `tie`, `bad` (both answers are bad),
    or empty if a judge gave no verdict. `style` has, for each property of `STYLE`, the relative difference
    (A - B) / (A + B) of its counts in the two answers. `battle` is the id of the comparison, `seconds` the
    time from the display of the answers to the vote, and `when` the Unix time of the vote."""

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
    """A model's rating in points: `Rating("r1", 1042.0, 1017.3, 1066.7, rank=1, votes=212, share=.56)`.

    `low` and `high` are the ends of the 95 % confidence interval. `rank` is one more than the number of
    models that are significantly better (whose difference in rating has an interval above 0). `votes` is the
    number of votes with this model, `share` the share of them that it won, where a tie counts as half a
    win."""

    model: str
    rating: float
    low: float
    high: float
    rank: int
    votes: int
    share: float


@dataclass(frozen=True)
class Ratings:
    """The ratings of all models, best first.

    `style` has, for each style property that was controlled for, the rating points that an answer gains from
    one standard deviation of the property, and the ends of the interval of that gain. `votes` is the number
    of votes rated."""

    models: tuple[Rating, ...]
    style: dict[str, tuple[float, float, float]]
    votes: int

    def of(self, model: str) -> Rating | None:
        """Return the rating of a model; None if it has no votes."""
        return next((rating for rating in self.models if rating.model == model), None)


def rate(votes: Iterable[Vote], control: Literal["", "length", "style"] = "") -> Ratings:
    """Compute the ratings of all models in the votes. Raises ValueError if votes of people and of judges are
    mixed.

    As a prior, each model gets one additional tie, divided equally among all other models. It keeps the
    rating of an unbeaten model finite and, for two models, equals Firth's correction of the bias of few
    votes (1993, Biometrika 80:27). Intervals come from the sandwich estimator (arXiv 2403.04132, section 5),
    which correctly makes them narrower where there are ties. With `control`, the effect of an answer's
    length or style on votes is estimated together with the strengths, and so does not influence the
    ratings."""
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
    """Draw the two models of the next comparison, on random sides.

    The probability of a pair is proportional to the amount by which one more vote would narrow the
    confidence interval of its win rate (arXiv 2403.04132, eq. 9). Pairs with few votes and pairs of equal
    strength are drawn most often."""
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
    """Count the votes on each pair of models, and the wins of the pair's first model. A pair is a tuple of
    two names in alphabetical order."""
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
    """Return the relative differences (A - B) / (A + B) between two answers in the counts of characters,
    headers, list items and bold spans.

    >>> style_of("four", "**four** is the answer")
    (-0.6923076923076923, 0.0, 0.0, -1.0)
    """
    differences = []
    for x, y in zip(_count_marks(a), _count_marks(b), strict=True):
        total = x + y
        differences.append((x - y) / total if total else 0.0)
    return tuple(differences)


def _count_marks(text: str) -> list[int]:
    """Return the count of each property of `STYLE` in a text: characters, headers, list items and bold
    spans."""
    counts = [len(text)]
    for mark in _MARKS.values():
        counts.append(len(mark.findall(text)))
    return counts


# ---------------------------------------------------------------- fitting


class _Regression:
    """The votes as rows of a logistic regression: the matrix `design_VX`, the outcomes `worth_V` (1 for a
    win of side A, 0.5 for a tie, 0 for a loss), and the weights `weight_V`.

    Equal votes form one row, whose weight is their number. After them follow the ties of the prior, each as
    two rows of half weight, a win and a loss."""

    def __init__(self, votes: Sequence[Vote], models: Sequence[str], style: Sequence[str]):
        """Build the rows. `models` are the names of all models; `style` names the style properties
        controlled for."""
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
        """Return the outcome of each row for side A: 1 for a win, 0.5 for a tie, 0 for a loss."""
        worths = [worth for _, _, worth, _ in self.cells]
        wins = [1.0] * len(self.pairs)
        losses = [0.0] * len(self.pairs)
        return worths + wins + losses

    def _weights(self) -> list[float]:
        """Return the weight of each row: the number of equal votes, or the weight of half a prior tie."""
        counts = [float(count) for count in self.cells.values()]
        halves = [self.tie_weight / 2] * (2 * len(self.pairs))
        return counts + halves

    def _set_sides(self) -> None:
        """Write 1 into each row's column of the model on side A, and -1 into the column of the model on side
        B."""
        column = {model: i for i, model in enumerate(self.models)}
        sides = [(a, b) for a, b, _, _ in self.cells]
        sides += self.pairs + self.pairs
        for row, (a, b) in enumerate(sides):
            self.design_VX[row, column[a]] = 1.0
            self.design_VX[row, column[b]] = -1.0

    def _set_style(self) -> None:
        """Write the style columns, divided by the standard deviation of each property.

        The mean is not subtracted, so that exchanging the two sides of a comparison does not change the
        result."""
        rows = len(self.cells)
        style = [properties for *_, properties in self.cells]
        style_VS = np.array(style).reshape(rows, len(self.style))
        variance_S = np.average(style_VS**2, axis=0, weights=self.weight_V[:rows])
        deviation_S = np.sqrt(variance_S)
        scale_S = np.where(deviation_S > 0, deviation_S, 1.0)
        self.design_VX[:rows, len(self.models) :] = style_VS / scale_S

    def count_wins(self, model: str) -> tuple[int, float]:
        """Return the number of votes with a model, and the share of them that it won, where a tie counts as
        half a win."""
        votes = 0
        wins = 0
        for (a, b, worth, _), count in self.cells.items():
            if model in (a, b):
                votes += count
                wins += count * (worth if a == model else 1 - worth)
        return votes, wins / votes


def _cell(vote: Vote, properties: int) -> tuple[str, str, float, tuple[float, ...]]:
    """Return the part of a vote that determines its row: the two models, the outcome for side A, and the
    first `properties` style properties."""
    return vote.a, vote.b, WORTH[vote.outcome], vote.style[:properties]


def _fit(table: _Regression) -> np.ndarray:
    """Fit the strengths [X] with the package evalica, without style properties, on the same rows."""
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
    """Fit the strengths and the style coefficients together; return them as [X]."""
    from scipy.optimize import minimize
    from scipy.special import expit

    design_VX = table.design_VX
    worth_V = table.worth_V
    weight_V = table.weight_V
    prior_XX = table.prior_XX

    def loss(x_X: np.ndarray) -> float:
        """Return the negative log-likelihood of the coefficients [X], plus the penalty of the prior."""
        logit_V = design_VX @ x_X
        nll_V = np.logaddexp(0, logit_V) - worth_V * logit_V
        penalty = x_X @ prior_XX @ x_X / 2
        return weight_V @ nll_V + penalty

    def gradient(x_X: np.ndarray) -> np.ndarray:
        """Return the gradient of the loss [X]."""
        residual_V = expit(design_VX @ x_X) - worth_V
        return design_VX.T @ (weight_V * residual_V) + prior_XX @ x_X

    def hessian(x_X: np.ndarray) -> np.ndarray:
        """Return the second derivatives of the loss [X, X]."""
        return _hessian(table, expit(design_VX @ x_X))

    start_X = np.zeros(design_VX.shape[1])
    options = {"gtol": GRADIENT_TOLERANCE}
    return minimize(loss, start_X, jac=gradient, hess=hessian, method="trust-exact", options=options).x


def _hessian(table: _Regression, chance_V: np.ndarray) -> np.ndarray:
    """Return the second derivatives [X, X] of the loss. `chance_V` is the probability, in each row, that
    side A wins."""
    design_VX = table.design_VX
    variance_V = table.weight_V * chance_V * (1 - chance_V)
    return (design_VX.T * variance_V) @ design_VX + table.prior_XX


def _covariance(table: _Regression, fitted_X: np.ndarray) -> np.ndarray:
    """Return the covariance [X, X] of the fitted coefficients by the sandwich estimator (Huber 1967): the
    inverse Hessian, times the sum of squared gradients, times the inverse Hessian."""
    from scipy.special import expit

    design_VX = table.design_VX
    chance_V = expit(design_VX @ fitted_X)
    bread_XX = np.linalg.inv(_hessian(table, chance_V))
    residual_V = table.worth_V - chance_V
    squares_V = table.weight_V * residual_V**2
    meat_XX = (design_VX.T * squares_V) @ design_VX
    return bread_XX @ meat_XX @ bread_XX


def _to_ratings(table: _Regression, fitted_X: np.ndarray, covariance_XX: np.ndarray) -> Ratings:
    """Convert coefficients to ratings in points, best first."""
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
    """Return a coefficient and the low and high end of its interval, in rating points. `error` is half the
    width of the interval."""
    ends = (coefficient + side * error for side in (0, -1, 1))
    return [POINTS * end for end in ends]


def _rank(i: int, fitted_X: np.ndarray, covariance_XX: np.ndarray, models: int) -> int:
    """Return the rank of model `i`: one more than the number of models that are significantly better."""
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
