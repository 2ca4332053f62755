"""Schedules as events against the bubbles of arXiv 2412.19437, Table 2, and DualPipe's README."""

from __future__ import annotations

from itertools import pairwise

import pytest

from limbeck.plan import gantt
from limbeck.plan.pipeline_schedules import Times, quick, seconds, simulate
from limbeck.types import LimbeckError


def even(stages: int, forward: float, backward: float, weight: float, send: float = 0.0) -> Times:
    return Times((forward,) * stages, (backward,) * stages, (weight,) * stages, send)


# B of the formulas is B + W here; F&B is F + B + W, as nothing overlaps
IDEAL = {
    "1f1b": lambda p, f, b, w: (p - 1) * (f + b + w),
    "gpipe": lambda p, f, b, w: (p - 1) * (f + b + w),
    "zb1p": lambda p, f, b, w: (p - 1) * (f + b - w),
    "dualpipe": lambda p, f, b, w: (p / 2 - 1) * (f + b + w + b + w - 3 * w),
    "dualpipev": lambda p, f, b, w: (p - 1) * (f + b + w + b + w - 3 * w),  # P chips with 2P stages
    "interleaved": lambda p, f, b, w: (p - 1) * (f + b + w),  # of stages half as long
}


@pytest.mark.parametrize("schedule", IDEAL)
@pytest.mark.parametrize("chips", [4, 8])
@pytest.mark.parametrize("work", [(1.0, 1.0, 1.0), (1.0, 1.2, 0.8), (1.0, 1.5, 0.5)])
def test_bubbles_are_the_papers(schedule, chips, work):
    stages, chunks = (2 * chips, 2) if schedule in ("interleaved", "dualpipev") else (chips, 1)
    line = simulate(schedule, even(stages, *work), chips, 4 * chips, chunks)
    assert line.bubble == pytest.approx(IDEAL[schedule](chips, *work))
    assert quick(schedule, even(stages, *work), chips, 4 * chips, chunks)[1] == pytest.approx(
        line.bubble, rel=0.35
    )


@pytest.mark.parametrize("schedule", IDEAL)
def test_every_piece_is_done_once_and_in_order(schedule):
    chips, micro = 4, 16
    stages, chunks = (8, 2) if schedule in ("interleaved", "dualpipev") else (4, 1)
    line = simulate(schedule, even(stages, 1, 1, 1), chips, micro, chunks)
    done = [(piece, slot) for slots in line.chips for slot in slots for piece in slot.pieces]
    assert len(done) == len({piece for piece, _ in done}) == 3 * stages * micro
    ends = {piece: slot.end for piece, slot in done}
    for piece, slot in done:
        if piece.kind == "F" and piece.stage:
            assert slot.start >= ends[piece._replace(stage=piece.stage - 1)] - 1e-9
    for slots in line.chips:
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(slots))


def test_a_slow_stage_holds_all_up():
    times = Times((1.0, 1.0, 2.0, 1.0), (1.0, 1.0, 2.0, 1.0), (1.0, 1.0, 2.0, 1.0))
    line = simulate("1f1b", times, 4, 40)
    assert max(line.busy) == 40 * 6 and 40 * 6 < line.seconds <= 40 * 6 + 3 * 3


def test_handing_on_takes_time_once_a_hop():
    assert simulate("1f1b", even(4, 1, 1, 1, 0.1), 4, 1).seconds == pytest.approx(12 + 6 * 0.1)


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe", "interleaved"])
def test_long_steps_are_foretold_from_short_ones(schedule):
    stages, chunks = (8, 2) if schedule == "interleaved" else (4, 1)
    times = even(stages, 1.0, 1.3, 0.7, 0.05)
    whole, bubble = seconds(schedule, times, 4, 96, chunks)
    line = simulate(schedule, times, 4, 96, chunks)
    assert whole == pytest.approx(line.seconds, rel=1e-3) and bubble == pytest.approx(line.bubble, rel=0.02)


def test_dualpipe_of_v3_has_the_passes_that_its_makers_time():
    """At the first chip of 16, with 120 micro-batches: 23 lone forwards, 97 pairs, 23 lone backwards, 15
    lone W."""
    line = simulate("dualpipe", even(16, 1, 1, 1), 16, 120)
    kinds = ["".join(piece.kind for piece in slot.pieces) for slot in line.chips[0]]
    assert [kinds.count(kind) for kind in ("F", "FBW", "W")] == [23, 97, 15]
    assert kinds.count("B") + kinds.count("BW") == 23


@pytest.mark.parametrize(
    ("schedule", "chips", "micro", "chunks", "sentence"),
    [
        ("round", 4, 8, 1, "schedule round is not known"),
        ("dualpipe", 4, 6, 1, "takes at least 8"),
        ("interleaved", 16, 40, 2, "waits for itself"),
    ],
)
def test_what_cannot_be_scheduled(schedule, chips, micro, chunks, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        simulate(schedule, even(chips * chunks, 1, 1, 1), chips, micro, chunks)


def test_the_picture(tmp_path):
    line = simulate("dualpipe", even(4, 1, 1, 1), 4, 8)
    text = gantt.schedule(line, tmp_path / "dualpipe.svg", "DualPipe").read_text()
    assert text.startswith("<?xml") and "chip 3" in text and "overlapped" in text
