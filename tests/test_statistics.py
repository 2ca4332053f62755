"""Intervals against hand-worked values and simulation; pass@k against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from limbeck.eval.statistics import (
    Interval,
    amount_interval,
    consensus,
    difference,
    mean_interval,
    pass_at_k,
    pooled_interval,
    wilson,
)


def test_wilson_by_hand():
    """8 of 10: (0.8 + 0.19207) / 1.38415 = 0.71674, half-width 0.22658 (z = 1.96)."""
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    low, high = wilson(0.0, 20)
    assert low == 0 and high == pytest.approx(0.1611, abs=5e-5)
    assert wilson(1.0, 20) == pytest.approx((1 - high, 1.0))


def test_one_binary_value_a_problem_is_wilson():
    interval = mean_interval([[1.0]] * 8 + [[0.0]] * 2)
    assert (interval.low, interval.high) == wilson(0.8, 10)
    assert (interval.mean, interval.n, interval.problems) == (0.8, 10, 10)


def test_repeating_completions_adds_no_certainty():
    """Sixteen identical completions of a problem say no more than one."""
    shares = [[0.25], [0.5], [1.0], [0.0], [0.75]]
    once = mean_interval(shares)
    often = mean_interval([values * 16 for values in shares])
    assert (once.low, once.high) == (often.low, often.high)
    assert (once.n, often.n) == (5, 80)


@pytest.mark.parametrize(
    "values", [[[0.0]], [[1.0, 1.0]], [[1.0]] * 50, [[0.0, 0.0]] * 50, [[0.01, 0.0], [0.0, 0.0]]]
)
def test_stays_inside_and_never_collapses(values):
    interval = mean_interval(values)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    assert interval.low < interval.high


def test_nothing_measured_is_refused():
    for nothing in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one"):
            mean_interval(nothing)


@pytest.mark.parametrize("samples", [1, 4])
def test_coverage(samples):
    """Problems differ in difficulty; about 95 of 100 intervals hold the true mean."""
    random = np.random.default_rng(7)
    hits = 0
    for _ in range(600):
        difficulty = random.beta(2, 1, size=120)  # mean 2/3
        values = random.random((120, samples)) < difficulty[:, None]
        interval = mean_interval(values.astype(float).tolist())
        hits += interval.low <= 2 / 3 <= interval.high
    assert 0.925 <= hits / 600 <= 0.975


def test_pooled_values_of_one_problem_are_one_observation():
    same = pooled_interval([[1, 1], [0, 0], [], [1, 0], [1, 1]])
    assert same.mean == 5 / 8 and (same.n, same.problems) == (8, 4)
    # deviations of the problems' sums from their expectation: 0.75, -1.25, -0.25, 0.75
    error = 1.959964 * (2.75 * 4 / 3) ** 0.5 / 8
    assert same.high - same.mean == pytest.approx(min(3 / 8, error), rel=1e-5)
    assert pooled_interval([[1, 1]]).low < 1


def test_amounts_are_not_shares():
    """Lengths 10 to 40: the standard error of four values, 12.91 / 2; never below 0, unknown for one."""
    lengths = amount_interval([[10], [20], [30], [40]])
    assert (lengths.mean, lengths.n, lengths.problems) == (25, 4, 4)
    assert lengths.high - 25 == pytest.approx(25 - lengths.low) == pytest.approx(1.959964 * 12.90994 / 2)
    assert amount_interval([[0], [0], [300]]).low == 0
    assert amount_interval([[10, 20]]) is None
    assert amount_interval([[7, 7], [7]]).low == 7


def test_difference_of_intervals():
    """Newcombe's own example (his table II, method 10): 56/70 - 48/80 has the interval 0.0524 to 0.3339."""
    a = Interval(56 / 70, *wilson(56 / 70, 70), n=70, problems=70)
    b = Interval(48 / 80, *wilson(48 / 80, 80), n=80, problems=80)
    assert difference(a, b) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_pass_at_k_is_the_share_of_all_draws():
    for n, k in [(5, 1), (5, 3), (6, 6), (7, 2)]:
        for c in range(n + 1):
            draws = list(itertools.combinations(range(n), k))
            brute = sum(any(i < c for i in draw) for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(brute)
    with pytest.raises(ValueError, match="pass@8"):
        pass_at_k(4, 1, 8)


def test_consensus():
    assert consensus(["a", "b", "b"]) == "b"
    assert consensus(["b", "a"]) == "b", "a tie goes to the earliest"
    assert consensus([None, "a", None]) == "a"
    assert consensus([None, None]) is None and consensus([]) is None
