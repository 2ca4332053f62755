"""Ratings from votes between two answers, after Bradley and Terry (1952), as Chatbot Arena makes them (arXiv 2403.04132).

P(a is preferred to b) = sigmoid(s_a - s_b + style), a tie being half a win for either. Strengths are told on the scale of
chess: 400 points are odds of ten to one, and 1000 is the mean of the models compared. Votes of people and votes of judges
are rated apart, always. Legend: V votes, P pairs of models, S properties of style, X models and those.
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

WORTH = {
    "a": 1.0,
    "tie": 0.5,
    "bad": 0.5,
    "b": 0.0,
}  # of an outcome to the answer on side A; both bad is a tie
POINTS, MIDDLE = 400 / math.log(10), 1000.0
STYLE = ("length", "headers", "lists", "bold")
CONTROLS = {"": (), "length": STYLE[:1], "style": STYLE}
_MARKS = {
    "headers": re.compile(r"^ {0,3}#{1,6} ", re.MULTILINE),
    "lists": re.compile(r"^\s*(?:[-*+]|\d{1,3}[.)]) ", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
}


@dataclass(frozen=True)
class Vote:
    """One vote: `Vote("r1", "small", "a", voter="Mei")` says that Mei prefers r1's answer, which stood on side A.

    `outcome` is `a`, `b`, `tie`, `bad` (both are), or nothing where a judge abstained. `style` holds, for each of `STYLE`, the
    difference of the two answers, A - B, over their sum. `seconds` went by between the answers and the vote, `when` is Unix time.
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
    """A model's place: `Rating("r1", 1042.0, 1017.3, 1066.7, rank=1, votes=212, share=.56)`.

    `low` and `high` are its 95 % interval beside the mean of all models; `rank` is one more than the number of models that are
    surely better (the interval of the difference is above 0); `share` counts wins and half of the ties.
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
    """Models, best first; and what style was worth: by property the points gained by one standard deviation, with its interval."""

    models: tuple[Rating, ...]
    style: dict[str, tuple[float, float, float]]
    votes: int

    def of(self, model: str) -> Rating | None:
        return next((rating for rating in self.models if rating.model == model), None)


def rate(votes: Iterable[Vote], control: Literal["", "length", "style"] = "") -> Ratings:
    """Ratings of the models in these votes, all of people or all of judges (else ValueError).

    Every model is given one tie beside its votes, spread over all others: half a win and half a loss, which keeps who won
    everything finite and, for two models, is Firth's remedy for the bias of few votes (1993, Biometrika 80:27). Intervals are
    the sandwich's (arXiv 2403.04132, section 5), which ties make narrower, as they should. With `control`, what an answer
    gains by its length or its looks is estimated beside the strengths and left out of them.
    """
    votes = [vote for vote in votes if vote.outcome in WORTH]
    if len({vote.judge for vote in votes}) > 1:
        raise ValueError("votes of people and votes of judges are rated apart")
    models = sorted({model for vote in votes for model in (vote.a, vote.b)})
    if not votes:
        return Ratings((), {}, 0)
    table = _Table(votes, models, CONTROLS[control])
    strengths = _controlled(table) if control else _plain(table)
    return _told(table, strengths, _sandwich(table, strengths))


def draw_pair(models: Sequence[str], votes: Iterable[Vote], dice: np.random.Generator) -> tuple[str, str]:
    """Two of the models for the next battle, on random sides. Pairs are drawn in proportion to what one more vote would take
    off their interval (arXiv 2403.04132, eq. 9): new and even pairs most often, settled ones seldom."""
    pairs = list(combinations(sorted(models), 2))
    met, won = Counter(), Counter()
    for vote in votes:
        if vote.outcome in WORTH and vote.a != vote.b:
            pair = tuple(sorted((vote.a, vote.b)))
            met[pair] += 1
            won[pair] += WORTH[vote.outcome] if vote.a == pair[0] else 1 - WORTH[vote.outcome]
    count_P = np.array([met[pair] + 1.0 for pair in pairs])
    share_P = np.array([won[pair] + 0.5 for pair in pairs]) / count_P
    gain_P = np.sqrt(share_P * (1 - share_P)) * (count_P**-0.5 - (count_P + 1) ** -0.5)
    one, other = pairs[dice.choice(len(pairs), p=gain_P / gain_P.sum())]
    return (one, other) if dice.random() < 0.5 else (other, one)


def style_of(a: str, b: str) -> tuple[float, ...]:
    """What `Vote.style` holds for two answers: normalised differences of characters, headers, list items and bold words.

    >>> style_of("four", "**four** is the answer")
    (-0.6923076923076923, 0.0, 0.0, -1.0)
    """
    counts = [[len(text), *(len(mark.findall(text)) for mark in _MARKS.values())] for text in (a, b)]
    return tuple((x - y) / (x + y) if x + y else 0.0 for x, y in zip(*counts, strict=True))


# ---------------------------------------------------------------- fitting


class _Table:
    """Votes as rows of a logistic regression: equal ones once, with their number as weight; the given ties after them, each as
    half a win and half a loss."""

    def __init__(self, votes: Sequence[Vote], models: Sequence[str], style: Sequence[str]):
        self.models, self.style = models, style
        self.cells = Counter((v.a, v.b, WORTH[v.outcome], v.style[: len(style)]) for v in votes)
        self.pairs = list(combinations(models, 2))
        self.given = 1 / (len(models) - 1)
        place = {model: i for i, model in enumerate(models)}
        ends = [(place[a], place[b]) for a, b, *_ in self.cells] + 2 * [
            (place[a], place[b]) for a, b in self.pairs
        ]
        rows, (left, right) = np.arange(len(ends)), np.array(ends).T
        self.design_VX = np.zeros((len(ends), len(models) + len(style)))
        self.design_VX[rows, left], self.design_VX[rows, right] = 1.0, -1.0
        self.worth_V = np.array(
            [worth for _, _, worth, _ in self.cells] + [1.0] * len(self.pairs) + [0.0] * len(self.pairs)
        )
        self.weight_V = np.array(
            [*map(float, self.cells.values()), *[self.given / 2] * (2 * len(self.pairs))]
        )
        looks_VS = np.array([looks for *_, looks in self.cells]).reshape(len(self.cells), len(style))
        # without centring, so that swapping the sides of a battle changes nothing
        spread_S = np.sqrt(np.average(looks_VS**2, axis=0, weights=self.weight_V[: len(self.cells)]))
        self.design_VX[: len(self.cells), len(models) :] = looks_VS / np.where(spread_S > 0, spread_S, 1.0)
        # strengths are fixed at mean 0; a coefficient of style is a draw from N(0, 1), or few votes could send it anywhere
        held = np.zeros(len(models) + len(style))
        held[: len(models)] = 1.0
        self.prior_XX = np.outer(held, held) + np.diag(1 - held)

    def won(self, model: str) -> tuple[int, float]:
        """A model's votes, and its share of them: wins, and half of the ties."""
        own = [
            (count, worth if a == model else 1 - worth)
            for (a, b, worth, _), count in self.cells.items()
            if model in (a, b)
        ]
        votes = sum(count for count, _ in own)
        return votes, sum(count * worth for count, worth in own) / votes


def _plain(table: _Table) -> np.ndarray:
    """Strengths by evalica, on the same rows."""
    import evalica

    sign = {1.0: evalica.Winner.X, 0.5: evalica.Winner.Draw, 0.0: evalica.Winner.Y}
    rows = [(a, b, sign[worth], float(count)) for (a, b, worth, _), count in table.cells.items()]
    xs, ys, winners, weights = zip(
        *rows, *((a, b, evalica.Winner.Draw, table.given) for a, b in table.pairs), strict=True
    )
    fitted = evalica.bradley_terry(xs, ys, winners, weights=list(weights), tolerance=1e-10, limit=10_000)
    strengths = np.log([fitted.scores[model] for model in table.models])
    return strengths - strengths.mean()


def _controlled(table: _Table) -> np.ndarray:
    """Strengths and coefficients of style together."""
    from scipy.optimize import minimize
    from scipy.special import expit

    design, worth, weight, prior = table.design_VX, table.worth_V, table.weight_V, table.prior_XX

    def loss(x: np.ndarray) -> float:
        logit = design @ x
        return weight @ (np.logaddexp(0, logit) - worth * logit) + x @ prior @ x / 2

    def slope(x: np.ndarray) -> np.ndarray:
        return design.T @ (weight * (expit(design @ x) - worth)) + prior @ x

    def curvature(x: np.ndarray) -> np.ndarray:
        chance = expit(design @ x)
        return (design.T * (weight * chance * (1 - chance))) @ design + prior

    start = np.zeros(design.shape[1])
    return minimize(loss, start, jac=slope, hess=curvature, method="trust-exact", options={"gtol": 1e-9}).x


def _sandwich(table: _Table, fitted: np.ndarray) -> np.ndarray:
    """Covariance of what was fitted: bread, meat, bread (Huber 1967)."""
    from scipy.special import expit

    design, weight, chance = table.design_VX, table.weight_V, expit(table.design_VX @ fitted)
    bread = np.linalg.inv((design.T * (weight * chance * (1 - chance))) @ design + table.prior_XX)
    meat = (design.T * (weight * (table.worth_V - chance) ** 2)) @ design
    return bread @ meat @ bread


def _told(table: _Table, fitted: np.ndarray, covariance: np.ndarray) -> Ratings:
    error = Z * np.sqrt(np.diag(covariance))
    ends = [
        tuple(float(MIDDLE + POINTS * (fitted[i] + side * error[i])) for side in (0, -1, 1))
        for i in range(len(table.models))
    ]
    rated = [
        Rating(model, *ends[i], _rank(i, fitted, covariance, len(table.models)), *table.won(model))
        for i, model in enumerate(table.models)
    ]
    style = {}
    for i, name in enumerate(table.style, len(table.models)):
        style[name] = tuple(float(POINTS * (fitted[i] + side * error[i])) for side in (0, -1, 1))
    return Ratings(tuple(sorted(rated, key=lambda one: -one.rating)), style, sum(table.cells.values()))


def _rank(i: int, fitted: np.ndarray, covariance: np.ndarray, models: int) -> int:
    """One more than the number of models that are surely better."""
    doubts = [
        math.sqrt(max(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j], 0.0)) for j in range(models)
    ]
    return 1 + sum(j != i and bool(fitted[j] - fitted[i] > Z * doubts[j]) for j in range(models))
