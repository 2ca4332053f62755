"""The plain lines of a run, as somebody sees them who has never seen any."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from limbeck import run_log
from limbeck.cli import display
from limbeck.cli.display import Lines, describe, span, time_left
from limbeck.pipeline.progress import Pace, Progress
from limbeck.report.history import History
from limbeck.run_log import TIMING, RunLog, prepare, read

pytestmark = pytest.mark.slow


def progress(folder: Path, kind: str = "pretrain", seconds: float = 0.0, **budget) -> Progress:
    """A stage that began some seconds ago."""
    stage = SimpleNamespace(kind=kind, **{"flops": None, "flops_of": None, **budget})
    return Progress(SimpleNamespace(name="base", kind=kind, stage=stage), folder, time.monotonic() - seconds)


def timed(folder: Path, of: int, *rows: tuple[int, float | None, int]) -> None:
    """A record of timing: step, seconds (None begins a process), tokens."""
    lines = [
        {"step": step, "of": of, "seconds": seconds, **({} if seconds is None else {"tokens": tokens})}
        for step, seconds, tokens in rows
    ]
    (folder / TIMING).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_stage_that_begins_says_so_once_and_a_number_every_ten_seconds(tmp_path, monkeypatch, capsys):
    """However slow the machine: before there is a record, before there is a step, and after."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: clock.now))
    lines, running = Lines(), {"base": progress(tmp_path, seconds=12)}
    for second in range(50):
        clock.now = 100.0 + second
        if second == 15:
            prepare(tmp_path, "writes its corpus, 34%")
        if second == 25:
            log = RunLog(tmp_path, 0, 40)
        if second == 35:
            log.step(0, {"loss": 4.0})
        lines.show(None, running)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "base: begins" and len(said) == 5 == len(set(said))
    assert said[1:3] == [
        "base: its process starts · 12 s so far",
        "base: writes its corpus, 34% · 12 s so far",
    ]
    assert re.fullmatch(r"base: 0 of 40 steps · this one takes \d s so far", said[3])
    assert said[4] == "base: 1 of 40 steps · loss 4"  # the first step tells nothing of the next


def test_time_left_is_measured_without_the_first_step_and_told_as_a_range_until_it_is_known(tmp_path):
    timed(tmp_path, 100, (-1, None, 0), (0, 600.0, 100), (1, 2.0, 100), (2, 4.0, 200))
    assert (
        describe(progress(tmp_path, seconds=700)) == "3 of 100 steps · 3 to 7 min left · 50 tokens a second"
    )
    timed(tmp_path, 100, (-1, None, 0), (0, 600.0, 100), *((step, 4.0, 8000) for step in range(1, 30)))
    assert describe(progress(tmp_path, seconds=700)) == "30 of 100 steps · 5 min left · 2,000 tokens a second"
    at_most = describe(progress(tmp_path, "rl", 700, flops_of="other"))
    assert at_most.startswith("30 of 100 steps · at most 5 min left")


def test_a_run_that_goes_on_measures_itself_and_not_what_lay_between(tmp_path):
    """What a process did before a kill is not the pace of the next."""
    timed(
        tmp_path,
        100,
        *((step, 900.0, 10) for step in range(30)),
        (29, None, 0),
        (30, 50.0, 10),
        (31, 1.0, 10),
        (32, 1.0, 10),
    )
    pace = progress(tmp_path, seconds=60).pace()
    assert (pace.looks, pace.steps, pace.seconds, pace.tokens) == (2, 2, 2.0, 20)
    assert describe(progress(tmp_path)).startswith(
        "33 of 100 steps · 45 s to 2 min left · 10 tokens a second"
    )


def test_a_step_that_takes_long_is_told_and_its_time_is_not_left_any_more(tmp_path):
    timed(tmp_path, 20, (-1, None, 0), *((step, 30.0, 900) for step in range(12)))
    past = time.time() - 25
    os.utime(tmp_path / TIMING, (past, past))
    said = describe(progress(tmp_path, "rl", 400))
    assert said.startswith("12 of 20 steps · 4 min left · this one takes 25 s so far · 30 tokens a second")
    assert describe(progress(tmp_path, "evaluate", 400)).startswith("12 of 20 parts")


@pytest.mark.parametrize("pace, steps, at_most, told", [
    (Pace(1, 1, 10.0, 0, 0.0), 6, False, "30 s to 2 min left"),
    (Pace(1, 10, 10.0, 0, 0.0), 600, False, "5 to 20 min left"),
    (Pace(4, 4, 40.0, 0, 0.0), 9, False, "72 s to 2 min left"),
    (Pace(2, 2, 20.0, 0, 0.0), 3, False, "20 to 45 s left"),
    (Pace(10, 10, 10.0, 0, 0.0), 60, False, "60 s left"),
    (Pace(10, 10, 10.0, 0, 90.0), 60, False, "0 s left"),
    (Pace(1, 1, 10.0, 0, 0.0), 3, True, "at most 60 s left"),
])  # fmt: skip
def test_time_left(pace, steps, at_most, told):
    assert time_left(pace, steps, at_most) == told


def test_spans():
    assert [span(s) for s in (0.4, 89.4, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]


def test_slow_steps_are_timed_although_they_are_not_logged(tmp_path, monkeypatch):
    """The metrics stay those of every tenth step; the tokens of the steps between are counted."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=lambda: clock.now))
    log = RunLog(tmp_path, 0, 100)
    for step in range(21):
        clock.now += 2.0
        if step % 10 == 0:
            log.step(step, {"loss": 1.0}, tokens=50)
        else:
            log.beat(step, 50)
    rows = list(read(tmp_path / TIMING))
    assert [row["step"] for row in rows] == [-1, 0, 3, 6, 9, 10, 13, 16, 19, 20]
    assert [row["tokens"] for row in rows[1:]] == [50, 150, 150, 150, 50, 150, 150, 150, 50]
    assert [row["step"] for row in read(tmp_path / run_log.METRICS)] == [0, 10, 20]
    history = History(tmp_path).look()
    assert (history.done, history.total, history.pace, history.seconds) == (21, 100, 2.0, 42.0)


def test_a_run_in_plain_lines_says_nothing_twice(finished, tmp_path):
    code, _, err = tiny.answer(
        "run",
        finished.recipe,
        "--runs",
        tmp_path / "runs",
        env=tiny.environment(NO_COLOR="1", FORCE_COLOR=""),
    )
    lines = err.splitlines()
    assert code == 0 and len(lines) == len(set(lines)), err
    assert next(line for line in lines if line.startswith("base: ")) == "base: begins"
    assert not list((tmp_path / "runs" / "store").glob("*/*.partial"))
