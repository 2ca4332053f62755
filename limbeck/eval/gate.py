"""The gate between two generations: paired tests of a candidate against the champion, the best model so far.

The candidate is promoted if every check passes at level alpha: its accuracy is better, and nothing else is
worse by as much as a margin. This is an intersection-union test (Berger 1982, Technometrics 24:295): whoever
is no better, or is worse by a margin in some respect, fails that one check with probability 1 - alpha at
least, and so is promoted with probability alpha at most, however many checks there are and however they
depend on one another. Over several gates the rates add up (Boole's inequality).

Differences are those of the candidate minus the champion, one for each problem: what they have in common
does not count, and the problem is the independent unit (Miller 2024, arXiv 2411.00640, section 4.2).

Dimensions: P problems · S values that a sum can have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..types import generator

MOST_STAKED = 0.6  # share of the capital that a bet may lose at most
ASSUMED_SQUARE = 0.25  # mean square of a difference before any is seen
ASSUMED_PROBLEMS = 3  # problems that this assumption counts as


@dataclass(frozen=True)
class Check:
    """The result of one check: `Check("accuracy", 340, 0.031, 0.004, 0.0, True)`.

    `n` is the number of problems (or votes) and `difference` the mean difference. `p` is the probability, at
    most, of what was seen if the candidate is no better (`margin` 0), or is worse by `margin` or more.
    """

    name: str
    n: int
    difference: float
    p: float
    margin: float
    passed: bool


@dataclass(frozen=True)
class Decision:
    """What the gate decides: the candidate is promoted if all of the `checks`, at level `alpha`, are
    passed."""

    alpha: float
    checks: tuple[Check, ...]

    @property
    def promoted(self) -> bool:
        """True if every check is passed."""
        return all(check.passed for check in self.checks)


def better(name: str, differences_P: np.ndarray, samples: int, alpha: float) -> Check:
    """Check that the mean of the differences [P] is above zero, by the exact sign-flip test.

    The accuracy of a problem is a mean over `samples` responses, each 0 or 1. With one response this is
    McNemar's exact test (1947, Psychometrika 12:153)."""
    p = sign_flip(differences_P, samples)
    return Check(name, len(differences_P), float(differences_P.mean()), p, 0.0, p <= alpha)


def not_worse(name: str, differences_P: np.ndarray, margin: float, alpha: float) -> Check:
    """Check that the mean of the differences [P], each in [-1, 1], is above `-margin`. Few problems show
    little, and do not pass. They are taken in a drawn order: one kind after the other, the first kind alone
    could pass for all."""
    order_P = generator("gate", name).permutation(len(differences_P))
    p = bet_against_loss(differences_P[order_P], margin)
    return Check(name, len(differences_P), float(differences_P.mean()), p, margin, p <= alpha)


def sign_flip(differences_P: np.ndarray, samples: int) -> float:
    """Return the probability, one sided, that the sum of the differences [P] is as great as it is or greater
    if each of them had its sign by chance. Exact: all combinations of signs are counted.

    Differences are taken to the nearest multiple of `1 / samples`.

    >>> sign_flip(np.array([1.0, 1.0, 1.0, 0.0]), 1)
    0.125
    """
    units_P = np.rint(differences_P * samples).astype(int)
    chance_S = np.ones(1)
    for size, count in sorted(Counter(np.abs(units_P[units_P != 0]).tolist()).items()):
        chance_S = np.convolve(chance_S, _sum_of_gains(size, count))
    # a sum is what the gains give, less what the losses take: all sizes together, less twice the losses
    gained = (int(units_P.sum()) + int(np.abs(units_P).sum())) // 2
    return min(1.0, float(chance_S[gained:].sum()))


def _sum_of_gains(size: int, count: int) -> np.ndarray:
    """Return the distribution [S] of the sum of those of `count` differences of one size that are gains: a
    binomial one, from logarithms of factorials."""
    log_factorial_S = np.concatenate([[0.0], np.log(np.arange(1, count + 1)).cumsum()])
    ways_S = log_factorial_S[-1] - log_factorial_S - log_factorial_S[::-1]
    chance_S = np.zeros(size * count + 1)
    chance_S[::size] = np.exp(ways_S - count * math.log(2))
    return chance_S


def bet_against_loss(differences_P: np.ndarray, margin: float) -> float:
    """Return the probability, at most, of such differences [P] in this order if their mean is `-margin` or
    less; each is in [-1, 1], however they are distributed.

    A bet on each difference multiplies a capital of 1 by `1 + stake * (difference + margin)`. If the mean is
    `-margin` or less no bet gains on average, so the capital reaches `1 / p` with probability p at most
    (Ville's inequality; Waudby-Smith and Ramdas 2024, arXiv 2010.09686, sections 4.1 and B.2). The stakes are
    those that gain most if the two models are equal, by the mean square of the differences before."""
    seen_P = np.arange(len(differences_P)) + ASSUMED_PROBLEMS
    before_P = np.concatenate([[0.0], np.cumsum(differences_P**2)[:-1]])
    square_P = (before_P + ASSUMED_PROBLEMS * ASSUMED_SQUARE) / seen_P
    stake_P = np.minimum(margin / (square_P + margin**2), MOST_STAKED / (1 - margin))
    capital_P = np.cumsum(np.log1p(stake_P * (differences_P + margin)))
    return float(np.exp(-max(0.0, capital_P.max())))


def family_rate(alpha: float, gates: int) -> float:
    """Return the probability, at most, that any of several gates at level `alpha` promotes falsely."""
    return min(1.0, gates * alpha)


def paired(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> tuple[np.ndarray, int]:
    """Return the differences [P] of the means of two models' values for each problem, and the least number of
    samples whose multiples of `1 / samples` they are."""
    means = [[sum(values) / len(values) for values in side] for side in (before, after)]
    counts = {len(values) for values in (*before, *after)}
    return np.subtract(means[1], means[0]), math.lcm(*counts)
