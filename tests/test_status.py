"""`limbeck status` and `limbeck watch`: a run seen from outside, at work, killed, stopped, not begun."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from pydantic import TypeAdapter

from limbeck.activity import ActivityReport, phase
from limbeck.cli import watch
from limbeck.config.load import dump, load
from limbeck.pipeline import run_status
from limbeck.pipeline.run_status import RunStatus
from limbeck.run_log import RunLog
from limbeck.types import Resumable

ALARM = "more than half of the responses run out of tokens: raise max_new_tokens"
RECIPE = """
name: small
problems: {clock: {source: miniature}}
stages:
  base: {kind: pretrain, problems: clock, tokens: 2000,
         shape: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 16}}
  zero: {kind: rl, model: base, problems: {clock: 1}, steps: 60}
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run that has not begun."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (tmp_path / "runs" / "store").mkdir()
    (folder / "recipe.yaml").write_text(dump(load(tmp_path / "small.yaml", [])))
    return folder


def begin(run: Path, state: RunStatus, stage: str = "zero") -> Path:
    """Say that a stage has begun a minute ago; its folder."""
    partial = run.parent / "store" / ".partial" / f"{stage}-1"
    partial.mkdir(parents=True)
    state.begun[stage] = partial.name
    state.starts[stage] = time.time() - 60
    state.tell("running")
    return partial


def test_status_tells_the_stage_at_work_its_step_rate_time_left_reward_and_process(call, run):
    with RunStatus(run) as state:
        partial = begin(run, state)
        log = RunLog(partial, 0, 60)
        for step in range(4):
            log._began -= 5
            log.step(step, {"reward": 0.25, "sampled_tokens": 5000, "alarms": [ALARM] if step == 3 else []})
        with ActivityReport(partial) as report, phase("sampling", "problems", 8):
            report.write()
            code, out, _ = call("status", run)
            told = json.loads(call("status", run, "--json")[1])
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["will", "run", "base"]
    found = re.fullmatch(
        r"running +zero +4 of 60 steps · (\d+) to (\d+) min left · 1,000 tokens a second · reward 0.25",
        lines[1],
    )
    assert found and int(found[1]) < 5 < int(found[2]), lines
    assert lines[2].split(maxsplit=1) == ["!", ALARM]
    assert re.fullmatch(rf"process {os.getpid()} on \S+ carries it out, since \S+ \S+ \(\d+ s\)", lines[3])
    row = told["data"][1]
    assert (row["state"], row["progress"]["done"], row["progress"]["total"]) == ("running", 4, 60)
    assert row["progress"]["metrics"]["reward"] == 0.25
    assert row["progress"]["rate"]["unit"] == "tokens a second"
    assert 200 < row["progress"]["left"]["low"] < row["progress"]["left"]["high"]
    assert row["progress"]["phases"][0]["name"] == "sampling"
    assert told["run"]["pid"] == os.getpid() and told["run"]["alive"] and told["run"]["host"]


def test_a_run_is_found_by_its_folder_and_by_its_name(call, run, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    assert call("status", "small") == call("status", "runs/small") == call("status", run)
    code, _, errors = call("status", "smal")
    assert code == 2 and "runs/smal is no run" in errors


def test_status_says_when_the_process_is_dead(call, run):
    with RunStatus(run) as state:
        begin(run, state)
        written = (run / run_status.STATUS).read_text()
    (run / run_status.STATUS).write_text(written)  # as a killed process leaves it
    _, out, _ = call("status", run)
    lines = out.splitlines()
    assert lines[1].split(maxsplit=2)[2] == "begun; goes on from its last checkpoint"
    assert lines[-1] == f"process {os.getpid()} on {os.uname().nodename} was killed; run again to go on"
    told = json.loads(call("status", run, "--json")[1])
    assert (told["run"]["state"], told["run"]["alive"], told["data"][1]["begun"]) == ("killed", False, True)
    code, out, _ = call("watch", run)
    assert code == 75 and "was killed; run again to go on" in out


def test_status_before_the_first_process_and_after_a_stop(call, run):
    assert call("status", run)[1].splitlines()[-1] == "nobody has carried it out yet"
    with pytest.raises(Resumable), RunStatus(run) as state:
        state.tell("paused")
        raise Resumable("stopped; the same command goes on from here")
    last = call("status", run)[1].splitlines()[-1]
    assert re.fullmatch(r"paused at \S+ \S+: stopped; the same command goes on from here", last)


def test_a_status_of_another_version_can_be_read(run):
    (run / run_status.STATUS).write_text(json.dumps({"state": "finished", "mood": "good"}))
    assert run_status.status(run).state == "finished"
    TypeAdapter(run_status.Status).validate_python(run_status.status(run))


def script(monkeypatch, *acts) -> None:
    """Let the run do something each time that the watch waits."""
    left = list(acts)
    clock = {name: getattr(time, name) for name in ("time", "strftime", "localtime")}
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=lambda seconds: left.pop(0)(), **clock))


def test_watch_follows_a_run_from_before_its_beginning_to_its_end(call, run, monkeypatch):
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").unlink()
    state = RunStatus(run)
    folders = []
    script(
        monkeypatch,
        lambda: (run / "recipe.yaml").write_text(recipe),
        state.__enter__,
        lambda: folders.append(begin(run, state)),
        lambda: RunLog(folders[0], 0, 60).step(0, {"reward": 0.5, "alarms": [ALARM]}),
        lambda: state.__exit__(None, None, None),
    )
    code, out, err = call("watch", run)
    lines = out.splitlines()
    assert code == 0 and err == ""
    assert lines[0] == f"{run}: has not begun; waits for `limbeck run`"
    assert lines[1] == f"{run}: nobody has carried it out yet; waits for `limbeck run`"
    assert lines[2:4] == ["zero: begins", f"zero, step 0: ! {ALARM}"]
    assert re.fullmatch(rf"{run}: finished at \S+ \S+", lines[4]) and len(lines) == 5


def test_ctrl_c_ends_the_watching_and_not_the_run(call, run, monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    script(monkeypatch, interrupt, interrupt)
    with RunStatus(run):
        for command in (("watch", run), ("status", run, "--follow")):
            code, out, err = call(*command)
            assert (code, out, err) == (0, "watches no more; the run goes on\n", "")
        assert run_status.is_running(run)


def test_watch_tells_programs_events_and_a_result(call, run, monkeypatch):
    state = RunStatus(run)
    script(
        monkeypatch,
        state.__enter__,
        lambda: begin(run, state),
        lambda: state.__exit__(Resumable, Resumable("x"), None),
    )
    code, out, _ = call("watch", run, "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 75 and [event["event"] for event in events] == ["said", "progress", "said", "result"]
    assert (events[1]["stage"], events[1]["total"], events[-1]["state"]) == ("zero", None, "paused")
    (run / "recipe.yaml").unlink()
    code, _, err = call("watch", run.parent.parent / "small.yaml")
    assert code == 2 and re.fullmatch(r"limbeck: \S+ is a file and no run; [^\n]+\n", err)


@pytest.mark.slow
def test_a_run_is_watched_from_another_process(finished, tmp_path):
    """Begun before the run, ended with it; the run says where it can be watched."""
    home = tmp_path / "runs"
    watching = tiny.limbeck("watch", home / "tiny")
    first = watching.stdout.readline()
    code, _, err = tiny.answer("run", finished.recipe, "--runs", home)
    out, watched_err = watching.communicate(timeout=60)
    assert code == 0 and watching.returncode == 0, watched_err
    assert f"limbeck watch {home / 'tiny'}, or limbeck serve --runs {home} and " in err
    assert "http://127.0.0.1:8000/runs/tiny" in err
    lines = out.splitlines()
    assert first.startswith(f"{home / 'tiny'}: has not begun")
    assert lines[-1].startswith(f"{home / 'tiny'}: fin")
    assert any(line.startswith("base: done in") for line in lines)
