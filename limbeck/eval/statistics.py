"""Statistics of evaluations: confidence intervals of shares, pass@k, majority voting, agreement of
annotators.

All intervals are 95 % confidence intervals. Completions of the same problem are correlated, so the problem,
not the completion, is the independent unit (Miller 2024, arXiv 2411.00640, section 2.2)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # standard errors: the 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval: `Interval(.848, .825, .869, n=1000, problems=1000)`. It is a
    share between 0 and 1, or an amount such as a number of tokens.

    `n` is the number of completions, `problems` the number of problems that they answer."""

    mean: float
    low: float
    high: float
    n: int
    problems: int


def mean_interval(values_by_problem: Sequence[Sequence[float]]) -> Interval:
    """Return the mean over problems of each problem's mean, with its 95 % confidence interval. Values lie in
    [0, 1].

    With one value per problem, each 0 or 1, the interval is Wilson's. Otherwise it is a normal interval on
    the problems' means, which allows for any correlation within a problem, clipped to [0, 1]. Raises
    ValueError if there are no problems, or if a problem has no values.

    >>> mean_interval([[1.0], [0.0], [1.0], [1.0]]).mean
    0.75
    """
    if not values_by_problem or not all(values_by_problem):
        raise ValueError("an interval needs at least one value for each of at least one problem")
    means = []
    n = 0
    for values in values_by_problem:
        means.append(sum(values) / len(values))
        n += len(values)
    problems = len(means)
    mean = sum(means) / problems
    squares = sum((m - mean) ** 2 for m in means)
    binary = n == problems and set(means) <= {0.0, 1.0}
    if binary or squares == 0:  # without variance the normal interval would have no width
        return Interval(mean, *wilson(mean, problems), n, problems)
    error = math.sqrt(squares / (problems - 1) / problems)
    low = max(0.0, mean - Z * error)
    high = min(1.0, mean + Z * error)
    return Interval(mean, low, high, n, problems)


def pooled_interval(values_by_problem: Sequence[Sequence[float]]) -> Interval:
    """Return the mean over all values of all problems, with its 95 % confidence interval. Values lie in
    [0, 1]; problems may have different numbers of them, also none. Values of one problem may depend on each
    other: the variance is that of a ratio of sums over problems (Cochran 1977, section 2.11). Raises
    ValueError if there is no value."""
    mean, error, n, problems = _pooled(values_by_problem)
    low, high = (mean - error, mean + error) if error else wilson(mean, n)
    return Interval(mean, max(0.0, low), min(1.0, high), n, problems)


def amount_interval(values_by_problem: Sequence[Sequence[float]]) -> Interval | None:
    """Return the mean over all values of all problems, amounts from 0 up such as lengths, with its 95 %
    confidence interval, computed as `pooled_interval` does; None if only one problem has values, as nothing
    is known of their variance then. Raises ValueError if there is no value.

    >>> amount_interval([[10.0], [14.0]]).mean
    12.0
    """
    mean, error, n, problems = _pooled(values_by_problem)
    return Interval(mean, max(0.0, mean - error), mean + error, n, problems) if problems > 1 else None


def _pooled(values_by_problem: Sequence[Sequence[float]]) -> tuple[float, float, int, int]:
    """Return the mean over all values, half the width of its interval (0 for a single problem), the number of
    values, and that of problems that have any."""
    groups = [values for values in values_by_problem if values]
    if not groups:
        raise ValueError("an interval needs at least one value")
    problems = len(groups)
    n = sum(map(len, groups))
    mean = sum(map(sum, groups)) / n
    squares = sum((sum(values) - mean * len(values)) ** 2 for values in groups)
    error = Z * math.sqrt(squares * problems / (problems - 1)) / n if problems > 1 else 0.0
    return mean, error, n, problems


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the ends of Wilson's score interval (1927) for a share observed in `n` trials. It always has a
    positive width and lies within [0, 1]."""
    square = Z * Z
    scale = 1 + square / n
    centre = (share + square / (2 * n)) / scale
    variance = share * (1 - share) / n + square / (4 * n * n)
    half = Z / scale * math.sqrt(variance)
    # rounding alone could leave the share outside at 0 and at 1
    low = min(share, centre - half)
    high = max(share, centre + half)
    return max(0.0, low), min(1.0, high)


def difference(a: Interval, b: Interval) -> tuple[float, float, float]:
    """Return the difference `a - b` and the ends of its interval (Newcombe 1998, Statistics in Medicine
    17:873, method 10).

    The two shares are treated as independent. Two models on the same problems usually fail at the same hard
    problems, which makes the true interval narrower, so a difference that is significant here would also be
    significant there."""
    gap = a.mean - b.mean
    down = math.hypot(a.mean - a.low, b.high - b.mean)
    up = math.hypot(a.high - a.mean, b.mean - b.low)
    return gap, gap - down, gap + up


def paired_difference(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the mean difference `b - a` of pairs (a, b), one for each problem, and the ends of its 95 %
    confidence interval.

    The interval is a normal one on the differences, so what the two sides have in common does not widen it
    (Miller 2024, arXiv 2411.00640, section 4.2). If all differences are equal, the interval is that of two
    independent shares. Raises ValueError if there are no pairs.

    >>> paired_difference([(0, 1), (0, 1), (1, 1), (0, 0)])[0]
    0.5
    """
    if not pairs:
        raise ValueError("a difference needs at least one pair")
    differences = [b - a for a, b in pairs]
    count = len(differences)
    gap = sum(differences) / count
    squares = sum((d - gap) ** 2 for d in differences)
    if squares == 0:
        before, after = zip(*pairs, strict=True)
        return difference(mean_interval([[x] for x in after]), mean_interval([[x] for x in before]))
    error = Z * math.sqrt(squares / (count - 1) / count)
    return gap, max(-1.0, gap - error), min(1.0, gap + error)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that at least one of `k` completions is correct, estimated from `n` completions
    of which `c` are correct.

    This is the unbiased estimate of Chen et al. 2021 (arXiv 2107.03374, eq. 1), unlike `1 - (1 - c/n)**k`.
    It is computed with exact integers, where the paper uses a numerically stable product. Raises ValueError
    unless 0 <= c <= n and 1 <= k <= n.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} completions, of which between none and all are right")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def consensus(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer, the earliest one among equally frequent answers; an answer that could
    not be read (None) does not count.

    This is majority voting, cons@k (Wang et al. 2022, arXiv 2203.11171).

    >>> consensus(["4", None, "5", "5", None, None])
    '5'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    answer, _ = votes.most_common(1)[0]
    return answer


def krippendorff(units: Sequence[Sequence[str]]) -> float | None:
    """Return Krippendorff's alpha for nominal values: 1 is perfect agreement, 0 is agreement by chance.

    `units` has, for each item, the values that its annotators gave. Their number may differ between items;
    an item with fewer than two is left out. Returns None if no disagreement can be expected: no item has two
    values, or all values are equal (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section
    C).

    >>> round(krippendorff([["a", "a"], ["a", "b"], ["b", "b"]]), 3)
    0.444
    """
    paired = [values for values in units if len(values) > 1]
    totals = Counter(value for values in paired for value in values)
    n = totals.total()
    expected = _unlike_pairs(totals)
    if not expected:
        return None
    observed = sum(_unlike_pairs(Counter(values)) / (len(values) - 1) for values in paired)
    return 1 - (n - 1) * observed / expected


def _unlike_pairs(counts: Counter[str]) -> int:
    """Return the number of ordered pairs of different values. `counts` is the number of times each value
    occurs."""
    return counts.total() ** 2 - sum(count * count for count in counts.values())
