"""How sure a share is: intervals, pass@k, consensus. Plain arithmetic, no model in sight.

Every interval is a 95% one. Completions of one problem resemble each other, so the problem, not the
completion, is what counts as a draw (Miller 2024, arXiv 2411.00640, section 2.2).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

Z = 1.959963984540054  # the 97.5% quantile of the normal distribution


@dataclass(frozen=True)
class Interval:
    """A share between 0 and 1 and its 95% interval: `Interval(.848, .825, .869, n=1000, problems=1000)`.

    `n` counts completions, `problems` the problems they belong to.
    """

    mean: float
    low: float
    high: float
    n: int
    problems: int


def mean_interval(values_by_problem: Sequence[Sequence[float]]) -> Interval:
    """The mean over problems of each problem's mean; values lie in [0, 1].

    One right-or-wrong value a problem: Wilson. Otherwise a normal interval on the problems' means, which is
    robust to any likeness within a problem, cut to [0, 1].

    >>> mean_interval([[1.0], [0.0], [1.0], [1.0]]).mean
    0.75
    """
    if not values_by_problem or not all(values_by_problem):
        raise ValueError("an interval needs at least one value for each of at least one problem")
    means = [sum(values) / len(values) for values in values_by_problem]
    n, problems = sum(map(len, values_by_problem)), len(means)
    mean = sum(means) / problems
    spread = sum((m - mean) ** 2 for m in means)
    binary = n == problems and all(m in (0.0, 1.0) for m in means)
    if binary or spread == 0:  # without any spread the normal interval would claim certainty
        low, high = wilson(mean, problems)
    else:
        error = math.sqrt(spread / (problems - 1) / problems)
        low, high = max(0.0, mean - Z * error), min(1.0, mean + Z * error)
    return Interval(mean, low, high, n, problems)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927), which neither leaves [0, 1] nor collapses at its ends."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    # rounding alone could leave the share outside at 0 and at 1
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def difference(a: Interval, b: Interval) -> tuple[float, float, float]:
    """`a - b` with its interval, from the two (Newcombe 1998, Statistics in Medicine 17:873, method 10).

    It takes the two as independent. Two models on the same problems usually agree on the hard ones, so the
    true interval is narrower: a difference that stands here stands.
    """
    gap = a.mean - b.mean
    down = math.hypot(a.mean - a.low, b.high - b.mean)
    up = math.hypot(a.high - a.mean, b.mean - b.low)
    return gap, gap - down, gap + up


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of `k` completions is right, where `c` of `n` were.

    Chen et al. 2021, arXiv 2107.03374, eq. 1: unbiased, unlike `1 - (1 - c/n)**k`; integers are
    exact where the paper needs a stable product.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} completions, of which between none and all are right")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k_interval(counts: Sequence[tuple[int, int]], k: int) -> Interval:
    """Mean pass@k over problems; `counts` holds `(n, c)` for each."""
    interval = mean_interval([[pass_at_k(n, c, k)] for n, c in counts])
    return replace(interval, n=sum(n for n, _ in counts))


def consensus(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the earliest of several; unreadable ones (None) have no vote.

    Majority voting, cons@k (Wang et al. 2022, arXiv 2203.11171).

    >>> consensus(["4", None, "5", "5", None, None])
    '5'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def krippendorff(units: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha for nominal values: 1 is perfect agreement, 0 what chance would give, below it is worse.

    `units` holds, for each thing judged, the values that its judges gave, in any number and by anybody; those with fewer
    than two count for nothing. None where there is no disagreement to expect: nobody judged twice, or one value was all
    that anybody gave (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C).

    >>> round(krippendorff([["a", "a"], ["a", "b"], ["b", "b"]]), 3)
    0.444
    """
    judged = [values for values in units if len(values) > 1]
    totals = Counter(value for values in judged for value in values)
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    if not expected:
        return None
    unlike = sum(
        (len(values) ** 2 - sum(c * c for c in Counter(values).values())) / (len(values) - 1)
        for values in judged
    )
    return 1 - (n - 1) * unlike / expected
