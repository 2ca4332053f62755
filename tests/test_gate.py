"""The gate between generations: its tests by hand, and its rate of false promotions by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from limbeck.eval.gate import (
    Decision,
    bet_against_loss,
    better,
    family_rate,
    not_worse,
    paired,
    sign_flip,
)

ALPHA = 0.05
TRIALS = 1000
SLACK = 3 * (ALPHA * (1 - ALPHA) / TRIALS) ** 0.5  # three standard errors of a simulated rate of ALPHA


def test_with_one_response_the_sign_flip_test_is_mcnemars():
    differences = np.array([1.0] * 19 + [-1.0] * 8 + [0.0] * 100)
    exact = binomtest(19, 27, alternative="greater").pvalue
    assert sign_flip(differences, 1) == pytest.approx(exact)
    assert sign_flip(-differences, 1) == pytest.approx(binomtest(8, 27, alternative="greater").pvalue)
    assert sign_flip(np.zeros(50), 1) == 1


def test_with_several_responses_all_signs_are_counted():
    differences = np.array([2, -1, 3, 0, 1, 1, -2, 3, 1, 0, 2]) / 3
    sizes = np.abs(differences)
    signs = np.array(list(itertools.product([-1, 1], repeat=len(sizes))))
    expected = ((signs * sizes).sum(1) >= differences.sum() - 1e-9).mean()
    assert sign_flip(differences, 3) == pytest.approx(expected)


def test_differences_are_of_means_by_problem():
    differences, samples = paired([[1.0, 0.0], [1.0, 1.0]], [[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert differences == pytest.approx([0.5, -2 / 3]) and samples == 6


def test_few_equal_answers_do_not_show_that_nothing_is_lost():
    """To rule a loss of 5 points out takes at least as many equal answers as would else be unlikely."""
    assert bet_against_loss(np.zeros(20), 0.05) > ALPHA
    assert 0.95**200 < bet_against_loss(np.zeros(200), 0.05) < ALPHA
    assert bet_against_loss(np.full(200, -0.2), 0.05) == 1


def test_a_kind_that_is_kept_does_not_pass_for_one_that_is_lost():
    """Whatever comes first: 100 equal answers to one kind, then 300 lost ones to another."""
    differences = np.concatenate([np.zeros(100), np.full(300, -1.0)])
    assert bet_against_loss(differences, 0.05) < ALPHA  # in this order
    assert not not_worse("general", differences, 0.05, ALPHA).passed


# ---------------------------------------------------------------- simulated generations


def responses(dice: np.random.Generator, chance: np.ndarray, samples: int) -> np.ndarray:
    """The share of right responses to each problem."""
    return dice.binomial(samples, chance) / samples


def gate(dice: np.random.Generator, gain: float, loss: float = 0.0, problems: int = 340) -> bool:
    """Whether a candidate is promoted that is right `gain` more often, on problems of all difficulties, and
    loses `loss` in language and in general ability. Problem by problem it may be better or worse."""
    hard = dice.beta(1, 1, problems)
    shift = dice.permutation(np.repeat([0.15, -0.15], problems // 2))
    after = np.clip(hard + shift * np.minimum(hard, 1 - hard) + gain, 0, 1)
    accuracy = responses(dice, after, 2) - responses(dice, hard, 2)
    language = np.where(dice.random(problems) < 0.1, dice.uniform(-0.5, 0.5, problems), 0.0) - loss
    general = responses(dice, np.full(problems, 0.97 - loss), 2)
    general -= responses(dice, np.full(problems, 0.97), 2)
    checks = (
        better("accuracy", accuracy, 2, ALPHA),
        not_worse("language", np.clip(language, -1, 1), 0.05, ALPHA),
        not_worse("general", general, 0.05, ALPHA),
    )
    return Decision(ALPHA, checks).promoted


def rate(gain: float, loss: float = 0.0, seed: int = 0) -> float:
    """The share of simulated candidates that are promoted."""
    dice = np.random.default_rng(seed)
    return float(np.mean([gate(dice, gain, loss) for _ in range(TRIALS)]))


def test_who_is_no_better_is_promoted_as_seldom_as_stated():
    false = rate(0.0)
    worse = rate(-0.03, seed=1)
    print(f"promoted, no better: {false:.3f}; 3 points worse: {worse:.3f}; stated: {ALPHA}")
    assert worse <= false <= ALPHA + SLACK


def test_who_is_better_but_loses_something_by_its_margin_is_not_promoted():
    """However great the gain is: the check that should fail does, whatever the others say."""
    lost = rate(0.3, loss=0.05, seed=2)
    print(f"promoted, 30 points better and 5 worse elsewhere: {lost:.3f}; stated: {ALPHA}")
    assert lost <= ALPHA + SLACK


def test_who_is_better_is_promoted():
    """The power of the gate, printed: a test that never promotes would keep its rate, too."""
    power = {gain: rate(gain, seed=3) for gain in (0.02, 0.05, 0.1)}
    print("promoted, by the true gain:", power)
    assert power[0.02] < power[0.05] < power[0.1]
    assert power[0.1] > 0.7


@pytest.mark.parametrize("generations", [3, 10])
def test_over_several_generations_the_rates_add_up_at_most(generations):
    """A champion that stays is asked anew in each gate: so the first false promotion is no likelier than the
    sum of the gates' rates."""
    dice = np.random.default_rng(4)
    trials = 2 * TRIALS // generations
    ever = np.mean([any(gate(dice, 0.0) for _ in range(generations - 1)) for _ in range(trials)])
    stated = family_rate(ALPHA, generations - 1)
    print(f"any false promotion in {generations} generations: {ever:.3f}; stated: at most {stated:.2f}")
    assert 0 < ever <= stated + 3 * (stated * (1 - stated) / trials) ** 0.5


@pytest.mark.parametrize("problems, margin, right", [(60, 0.05, 1.0), (340, 0.05, 0.95), (200, 0.1, 0.6)])
def test_a_loss_of_the_margin_is_ruled_out_as_seldom_as_stated(problems, margin, right):
    """Also where the champion is always right, so that differences are as skewed as they can be."""
    dice = np.random.default_rng(5)
    passed = 0
    for _ in range(TRIALS):
        before = dice.random(problems) < right
        after = dice.random(problems) < right - margin
        passed += not_worse("general", after.astype(float) - before, margin, ALPHA).passed
    assert passed / TRIALS <= ALPHA + SLACK


def test_votes_of_people_are_differences_too():
    dice = np.random.default_rng(6)
    equal = [not_worse("arena", dice.choice([1.0, 0.0, -1.0], 100), 0.3, ALPHA).passed for _ in range(300)]
    behind = dice.choice([1.0, 0.0, -1.0], (300, 100), p=[0.25, 0.2, 0.55])
    assert np.mean(equal) > 0.7
    assert np.mean([not_worse("arena", votes, 0.3, ALPHA).passed for votes in behind]) <= ALPHA + 0.04
