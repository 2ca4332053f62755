"""The plain lines of a run, as somebody sees them who has never seen any."""

from __future__ import annotations

import io
import json
import math
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from limbeck import activity, run_log
from limbeck.activity import ActivityReport, phase
from limbeck.cli import display
from limbeck.cli.display import Lines, Tree, span, time_left
from limbeck.pipeline import progress as progress_module
from limbeck.pipeline.progress import Pace, Progress, TimeLeft, left_at_pace
from limbeck.report.history import History
from limbeck.run_log import TIMING, RunLog, read


def describe(progress: Progress) -> str:
    """The line of a stage."""
    return display.describe(progress.node.kind, progress.figures())


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


@pytest.fixture
def hands(monkeypatch) -> SimpleNamespace:
    """A clock for all that tells the time of a stage; it stands still until it is set."""
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    for module in (activity, display, progress_module, run_log):
        monkeypatch.setattr(module, "time", fake)
    return clock


def test_a_stage_that_begins_says_so_once_and_a_number_every_ten_seconds(tmp_path, hands, capsys):
    """However slow the machine: before there is a record, before there is a step, and within a step."""
    stage = SimpleNamespace(
        name="base", kind="rl", stage=SimpleNamespace(kind="rl", flops=1.0, flops_of=None)
    )
    lines, running = Lines(), {"base": Progress(stage, tmp_path, hands.now)}
    begun, told = hands.now, []

    def pass_time(seconds: int) -> None:
        """Look four times a second, as a run does."""
        for _ in range(4 * seconds):
            hands.now += 0.25
            report.write()
            lines.show(None, running)
            told.extend((hands.now - begun, line) for line in capsys.readouterr().err.splitlines())

    with ActivityReport(tmp_path) as report:
        report._ended.set()  # this test writes by its own clock
        report._thread.join()
        pass_time(12)
        with phase("loading the model", "files", 2) as loading:
            pass_time(6)
            loading.advance()
            pass_time(12)
        RunLog(tmp_path, 0, 40)
        os.utime(tmp_path / TIMING, (hands.now, hands.now))
        with phase("sampling", "problems", 8), phase("", "rows", 64) as rows:
            for _ in range(30):
                pass_time(1)
                rows.add_tokens(500)
                rows.advance()
    moments = [moment for moment, _ in told]
    assert moments[0] <= 10 and max(b - a for a, b in pairwise(moments)) <= 10
    texts = [text for _, text in told]
    assert len(texts) == len(set(texts)) and texts[0] == "base: begins"
    assert texts[1] == "base: its process starts · 9 s so far"
    assert re.fullmatch(r"base: loading the model 1 of 2 files · \d+ s so far", texts[2])
    assert re.fullmatch(
        r"base: 0 of 40 steps · this one takes \d+ s so far · sampling 0 of 8 problems, (\d+) of 64 rows"
        r" · 490 tokens a second", texts[-1],
    ), texts  # fmt: skip


def test_alarms_are_told_once_and_in_full_however_narrow_the_terminal(tmp_path, capsys):
    alarm = "more than half of the responses run out of tokens: raise max_new_tokens " + "very long " * 30
    RunLog(tmp_path, 0, 40).step(3, {"reward": 0.0, "alarms": [alarm]})
    shown = {"zero": progress(tmp_path, "rl")}
    lines = Lines()
    for _ in range(3):
        lines.show(None, shown)
    assert capsys.readouterr().err.splitlines() == [f"zero, step 3: ! {alarm}", "zero: begins"]
    RunLog(tmp_path, 4, 40).step(4, {"alarms": ["no learning signal: every answer is wrong"]})
    lines.show(None, shown)  # the stage tells it itself, with an example
    assert capsys.readouterr().err == ""
    lines.told_by_stages = ()
    lines.show(None, shown)
    assert capsys.readouterr().err == "zero, step 4: ! no learning signal: every answer is wrong\n"
    RunLog(tmp_path, 4, 40).step(3, {"alarms": [alarm]})
    written = io.StringIO()
    tree = Tree(written, width=40)
    tree.show(SimpleNamespace(nodes={}), shown)
    tree.close()
    assert " ".join(written.getvalue().split()) == f"zero, step 3: ! {alarm}".strip()
    figures = shown["zero"].figures()
    assert display.alarms(figures) == [f"step 3: ! {alarm}"]


def test_the_time_left_never_climbs_while_steps_take_what_they_took(tmp_path, hands):
    """Ten seconds a step, looked at every second; also while the last step takes longer than the others."""
    path = tmp_path / TIMING
    begun = hands.now
    rows = [{"step": -1, "of": 20, "seconds": None}]
    stage = SimpleNamespace(name="x", kind="sft", stage=SimpleNamespace(kind="sft"))
    forecast = {"seconds": 240.0, "low": 120.0, "high": 480.0}
    watched = Progress(stage, tmp_path, begun, forecast)
    highs, point = [], []
    for second in range(1, 231):
        hands.now = begun + second
        if second % 10 == 0 and second <= 180:
            rows.append({"step": second // 10 - 1, "of": 20, "seconds": 10.0, "tokens": 100})
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.utime(path, (hands.now, hands.now))
        left = watched.figures().left
        highs.append(left.high)
        if left.low == left.high:
            point.append(left.low)
    assert highs == sorted(highs, reverse=True)
    assert highs[0] == 479 and watched.figures().left == TimeLeft(10.0, 10.0)
    assert len(point) > 100 and point[0] == pytest.approx(90.0)


def test_the_time_left_of_a_single_part_comes_from_its_problems_and_does_not_climb(tmp_path, hands):
    """One problem every seven seconds of a hundred."""
    stage = SimpleNamespace(name="x", kind="evaluate", stage=SimpleNamespace(kind="evaluate"))
    watched = Progress(stage, tmp_path, hands.now)
    RunLog(tmp_path, 0, 1)
    highs = []
    with ActivityReport(tmp_path) as report, phase("sampling", "problems", 100) as asked:
        report._ended.set()
        report._thread.join()
        for second in range(1, 600):
            hands.now += 1
            if second % 7 == 0:
                asked.advance()
            report.write()
            left = watched.figures().left
            assert bool(left) == (second >= 7)
            highs.append(left.high if left else math.inf)
    assert highs == sorted(highs, reverse=True)


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
    (Pace(10, 10, 10.0, 0, 90.0), 60, False, "59 s left"),
    (Pace(10, 10, 10.0, 0, 90.0), 1, False, "0 s left"),
    (Pace(1, 1, 10.0, 0, 0.0), 3, True, "at most 60 s left"),
])  # fmt: skip
def test_time_left(pace, steps, at_most, told):
    assert time_left(left_at_pace(pace, steps, at_most)) == told


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


@pytest.mark.slow
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
