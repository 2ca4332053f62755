"""Ratings from votes between two answers, after Bradley and Terry (1952), as Chatbot Arena makes them (arXiv 2403.04132).

P(a is preferred to b) = sigmoid(s_a - s_b + style), a tie being half a win for either. Strengths are told on the scale of
chess: 400 points are odds of ten to one, and 1000 is the mean of the models compared. Votes of people and votes of judges
are rated apart, always. Legend: V votes, P pairs of models, M models, S properties of style.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from .statistics import Z

WORTH = {"a": 1.0, "tie": 0.5, "bad": 0.5, "b": 0.0}  # of an outcome to the answer on side A; both bad is a tie
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
    """Votes as rows of a logistic regression, the given ties after them (each as half a win and half a loss)."""

    def __init__(self, votes: Sequence[Vote], models: Sequence[str], style: Sequence[str]):
        self.votes, self.models, self.style = votes, models, style
        place = {model: i for i, model in enumerate(models)}
        self.pairs = list(combinations(models, 2))
        ends = [(place[v.a], place[v.b]) for v in votes] + 2 * [(place[a], place[b]) for a, b in self.pairs]
        self.design_VX = np.zeros((len(ends), len(models) + len(style)))
        rows, (left, right) = np.arange(len(ends)), np.array(ends).T
        self.design_VX[rows, left], self.design_VX[rows, right] = 1.0, -1.0
        looks_VS = np.array([vote.style for vote in votes])[:, : len(style)]
        # without centring, so that swapping the sides of a battle changes nothing
        spread_S = np.sqrt((looks_VS**2).mean(0))
        self.design_VX[: len(votes), len(models) :] = looks_VS / np.where(spread_S > 0, spread_S, 1.0)
        given = 1 / (len(models) - 1)
        self.worth_V = np.array([WORTH[v.outcome] for v in votes] + [1.0] * len(self.pairs) + [0.0] * len(self.pairs))
        self.weight_V = np.array([1.0] * len(votes) + [given / 2] * (2 * len(self.pairs)))
        # strengths are fixed at mean 0; a coefficient of style is a draw from N(0, 1), or few votes could send it anywhere
        held = np.zeros(len(models) + len(style))
        held[: len(models)] = 1.0
        self.prior_XX = np.outer(held, held) + np.diag(1 - held)


def _plain(table: _Table) -> np.ndarray:
    """Strengths by evalica, on the same rows."""
    import evalica

    given = [(a, b, evalica.Winner.Draw, 1 / (len(table.models) - 1)) for a, b in table.pairs]
    sign = {1.0: evalica.Winner.X, 0.5: evalica.Winner.Draw, 0.0: evalica.Winner.Y}
    xs, ys, winners, weights = zip(*[(v.a, v.b, sign[WORTH[v.outcome]], 1.0) for v in table.votes], *given, strict=True)
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
    rated: list[dict[str, Any]] = []
    for i, model in enumerate(table.models):
        gaps = [(fitted[j] - fitted[i], covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]) for j in range(len(table.models))]
        worth = [WORTH[v.outcome] if v.a == model else 1 - WORTH[v.outcome] for v in table.votes if model in (v.a, v.b)]
        rated.append({
            "model": model, "rating": MIDDLE + POINTS * fitted[i], "low": MIDDLE + POINTS * (fitted[i] - error[i]),
            "high": MIDDLE + POINTS * (fitted[i] + error[i]), "rank": 1 + sum(gap > Z * math.sqrt(max(v, 0)) for gap, v in gaps if gap > 0),
            "votes": len(worth), "share": sum(worth) / len(worth),
        })  # fmt: skip
    rated.sort(key=lambda one: -one["rating"])
    style = {}
    for i, name in enumerate(table.style, len(table.models)):
        style[name] = tuple(float(POINTS * (fitted[i] + side * error[i])) for side in (0, -1, 1))
    return Ratings(tuple(Rating(**{k: float(v) if isinstance(v, np.floating) else v for k, v in one.items()}) for one in rated), style, len(table.votes))
