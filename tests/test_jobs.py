"""Runs as processes of their own: started, watched, paused and gone on with, whoever started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from tiny import limbeck, until

from limbeck.pipeline import run_status
from limbeck.pipeline.review import review_queue
from limbeck.serve import jobs
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow

RECIPE = """
name: brief
threads: 1
problems: {chat: {source: miniature, modulus: 3, numbers: 3, largest: 2, task: repeat}}
stages:
  rows: {kind: general, problems: chat, rows: 4}
  coldstart: {kind: curate, rows: rows}
  base:
    kind: pretrain
    problems: chat
    tokens: 3000
    batch_tokens: 512
    shape: {hidden_size: 16, layers: 1, heads: 1, kv_heads: 1, intermediate_size: 32}
    save_every: 600
"""
LONG = "stages.base.tokens=2000000"  # minutes; nobody waits for its end


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "brief.yaml"
    path.write_text(RECIPE)
    yield path
    if (child := jobs._child(tmp_path / "runs" / "brief")) and jobs._start_time(
        child["pid"]
    ):  # a test has failed
        os.kill(child["pid"], signal.SIGKILL)


def at(folder, *names):
    """Wait until a run is in one of these states; the state."""
    until(lambda: jobs.state(folder).name in names)
    return jobs.state(folder)


def steps(folder):
    """The pretraining's steps as they are written."""
    paths = list(folder.parent.glob("store/.partial/pretrain-*/metrics.jsonl"))
    return len(paths[0].read_text().splitlines()) if paths else 0


def test_a_run_is_started_once_paused_and_gone_on_with_and_waits_for_people(recipe, tmp_path):
    folder = jobs.start(recipe, tmp_path / "runs", [LONG])
    assert folder == tmp_path / "runs" / "brief" and jobs.state(folder).name == "running"
    with pytest.raises(LimbeckError, match="carried out already"):
        jobs.start(recipe, tmp_path / "runs")
    until(lambda: steps(folder) > 2)
    with pytest.raises(LimbeckError, match="carried out already"):
        jobs.resume(folder)
    assert "base" in run_status.status(folder).begun
    for _ in range(3):  # asked three times is not the second Ctrl-C that kills
        jobs.pause(folder)
    assert jobs.state(folder).name == "pausing"
    paused = at(folder, "paused", "failed")
    assert (paused.name, paused.sentence) == ("paused", "stopped; the same command goes on from here")
    with pytest.raises(LimbeckError, match="nothing to pause"):
        jobs.pause(folder)

    jobs.start(recipe, tmp_path / "runs")  # another setting, less to do: the run of this name goes on with it
    until(lambda: run_status.status(folder).state == "waits" and not run_status.is_running(folder))
    waits = jobs.state(folder)
    assert waits.name == "waits" and "4 rows to review" in waits.sentence
    queue = next((tmp_path / "runs" / "store" / ".queues").iterdir())
    for row in review_queue.pending(queue):
        review_queue.review(queue, {"id": row["id"], "verdict": "accept", "reviewer": "Mei"})
    jobs.resume(folder)
    assert at(folder, "finished", "failed", "waits").name == "finished"


def test_a_run_that_somebody_started_at_a_terminal_is_seen_paused_and_its_death_told(recipe, tmp_path):
    folder = tmp_path / "runs" / "brief"
    assert jobs.state(folder).name == ""
    run = limbeck("run", recipe, "--runs", tmp_path / "runs", "--set", LONG)
    until(lambda: steps(folder) > 0)
    assert jobs.state(folder).name == "running"
    with pytest.raises(LimbeckError, match="carried out already"):
        jobs.start(recipe, tmp_path / "runs")
    jobs.pause(folder)
    assert run.communicate(timeout=100)[1].strip().endswith("goes on from here") and run.returncode == 75
    assert jobs.state(folder).name == "paused"

    again = limbeck("run", recipe, "--runs", tmp_path / "runs", "--set", LONG)
    until(lambda: jobs.state(folder).name == "running")
    again.kill()
    again.communicate()
    dead = jobs.state(folder)
    assert dead.name == "failed" and "its last checkpoint" in dead.sentence


def test_a_run_outlives_whoever_started_it(recipe, tmp_path):
    code = (
        "import sys; from pathlib import Path; from limbeck.serve import jobs; "
        "jobs.start(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(recipe), str(tmp_path / "runs")], check=True)
    folder = tmp_path / "runs" / "brief"
    assert at(folder, "waits", "failed").name == "waits"
    assert "base: begins" in (folder / jobs.LOG).read_text()


def test_what_stops_a_run_before_it_begins_is_told(recipe, tmp_path):
    with pytest.raises(LimbeckError, match="did you mean tokens"):
        jobs.start(recipe, tmp_path, ["stages.base.tokns=5"])
    recipe.write_text(RECIPE.replace("stages:", "stages:\n  brought: {kind: load, path: nowhere}"))
    with pytest.raises(LimbeckError, match="stages.brought.path"):
        jobs.start(recipe, tmp_path)
    assert not (tmp_path / "brief").exists()
    keyless = (
        "{kind: remote, url: http://localhost:1/v1, model: wise, key: NOBODY_HAS_THIS_KEY, licence: MIT}"
    )
    recipe.write_text(RECIPE.replace("stages:", f"stages:\n  teacher: {keyless}"))
    folder = jobs.start(recipe, tmp_path)
    assert jobs.state(folder).name == "running"
    failed = at(folder, "failed")
    assert "NOBODY_HAS_THIS_KEY" in failed.sentence and "Traceback" not in failed.sentence
    with pytest.raises(LimbeckError, match="is no run"):
        jobs.resume(tmp_path / "nobody")


def test_who_waits_and_then_sees_the_reviews_itself_is_not_started_twice(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with run_status.RunStatus(tmp_path) as run:
        run.tell("waits")
        assert jobs.state(tmp_path).name == "waits"  # it is about to end, or to look a last time
        seen = threading.Timer(0.2, run.tell, ["running"])
        seen.start()
        jobs.resume(tmp_path)
        assert jobs.state(tmp_path).name == "running" and not (tmp_path / jobs.CHILD).exists()
        seen.join()


def test_a_number_that_another_process_has_is_not_ours(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / jobs.LOG).write_text("limbeck: it was so\n")
    born = jobs._start_time(os.getpid())
    told = {"pid": os.getpid(), "since": time.time(), "right": None}
    (folder / jobs.CHILD).write_text(json.dumps({**told, "born": born}))
    assert jobs.state(folder).name == "running"
    (folder / jobs.CHILD).write_text(json.dumps({**told, "born": "1"}))
    assert jobs.state(folder) == jobs.State("failed", "it was so", told["since"])
