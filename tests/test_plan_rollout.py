"""The cost of reinforcement learning: lengths, the tail, R1-Zero's bill and Delethink's steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from limbeck.plan import cluster, models
from limbeck.plan.rl import RL, Lengths, Phase, decode_seconds, r1_zero
from limbeck.types import LimbeckError


@pytest.mark.parametrize("mean", [1500, 8000, 20000])
def test_lognormal_lengths_have_the_mean_that_was_asked_for(mean):
    lengths = Lengths(mean, cap=32768, spread=0.8)
    drawn = lengths.draw(4001)
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.01) and max(drawn) <= 32768
    assert lengths.truncated == pytest.approx(sum(x >= 32768 for x in drawn) / len(drawn), abs=2e-3)
    assert lengths.quantile(0.5) < mean


def test_seen_lengths():
    seen = Lengths.of([10, 20, 30, 400], cap=100)
    assert seen.mean == 40 and seen.truncated == 0.25 and seen.draw(4) == [10, 20, 30, 100]
    with pytest.raises(LimbeckError, match="do not fit under a cap of 100"):
        Lengths(200, 100).draw(3)


def test_everybody_waits_for_the_longest():
    """A step of one second for any rows: the time is the longest length, or the work over the rows."""

    def even(rows, context):
        return 1.0

    assert decode_seconds([5, 10, 100], 3, even, 0)[0] == pytest.approx(100)
    assert decode_seconds([10] * 40, 4, even, 0)[0] == pytest.approx(100)
    seconds, tail = decode_seconds([10] * 99 + [1000], 100, even, 0)
    assert tail / seconds > 0.95
    assert decode_seconds([100, 100], 2, lambda rows, context: rows, 0)[0] == pytest.approx(200)
    assert decode_seconds([100], 1, lambda rows, context: context, 50)[0] == pytest.approx(
        100 * 100, rel=0.01
    )


def test_r1_zero():
    """101K GPU-hours on 512 H800 (2501.12948v2, Table 7): within a factor of two, and the interval."""
    run = r1_zero(models.find("r1-zero"), cluster.cluster("512xH800"))
    assert sum(phase.rollouts for phase in run.phases) == 650
    plan = run.plan()
    hours, low, high = plan.chip_hours
    assert 101e3 / 2 < hours < 101e3 * 2 and low < 101e3 < high and high / low < 5
    assert "longest" in plan.binds and plan.parts["tail"] > 0.5 * plan.parts["rollout"]


@pytest.mark.parametrize(
    ("window", "mean", "generation", "backward"), [(0, 8300, 170, 70), (8192, 8600, 130, 80)]
)
def test_delethink(window, mean, generation, backward):
    """One step of R1-Distill-1.5B on eight H100 with 24K tokens (2510.06557); the means: from its rates."""
    run = RL(
        models.find("r1-distill-qwen-1.5b"),
        cluster.cluster("8xH100"),
        (Phase(1, Lengths(mean, 24576)),),
        samples=1024,
        replica=1,
        extra=0,
        window=window,
        offload=False,
    )
    parts = run.parts(run.phases[0].lengths)
    assert parts["rollout"] == pytest.approx(generation, rel=0.25)
    assert parts["learning"] == pytest.approx(backward, rel=0.25)


def test_what_helps():
    small = RL(
        models.find("r1-distill-qwen-1.5b"),
        cluster.cluster("8xH100"),
        (Phase(1, Lengths(4000, 16384)),),
        samples=512,
        replica=1,
    )
    assert replace(small, overlap=True).seconds() < small.seconds()
    assert replace(small, speculation=1.5).seconds() < small.seconds()
    assert (
        replace(small, phases=(Phase(1, Lengths(4000, 16384, 0.3)),)).seconds() < small.seconds()
    )  # the same tokens, a shorter tail
    assert replace(small, grading=60).seconds() > small.seconds()
    plan = small.plan()
    assert plan.low < plan.seconds < plan.high


def test_replicas_divide_the_cluster():
    with pytest.raises(LimbeckError, match="8 chips do not fall into replicas of 3"):
        RL(models.find("r1-distill-qwen-1.5b"), cluster.cluster("8xH100"), (), 8, replica=3)
