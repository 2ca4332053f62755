"""Killed at any instant and run again, a stage and a run end with the bytes of one that was never killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from tiny import Attempt, alive, answer, children, digests, limbeck, until

from limbeck.model import kernels
from limbeck.pipeline.worker import KERNELS, read_job, run_job

pytestmark = pytest.mark.slow

STAGES = ("brought", "base", "zero", "screened", "traces", "coldstart", "general", "dev1", "evaluation/zero")
KILLS = 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_random_instants_ends_with_the_same_bytes(nursery, finished, tmp_path, stage):
    attempt, instants = Attempt(nursery, finished, tmp_path, stage), random.Random(stage)
    killed = 0
    for _ in range(KILLS):
        process = attempt.start()
        process.join(instants.uniform(0.02, 0.05 + attempt.seconds))
        killed += process.is_alive()
        process.kill()
        process.join()
    assert killed
    assert attempt.end() == attempt.expected


@pytest.mark.parametrize("stage", ["zero", "dev1"])
def test_a_stage_that_had_no_time_to_checkpoint_begins_again_and_ends_the_same(
    nursery, finished, tmp_path, stage
):
    attempt = Attempt(nursery, finished, tmp_path, stage, f"stages.{stage}.save_every=60")
    process = attempt.start()
    process.join(0.7 * attempt.seconds)
    process.kill()
    process.join()
    assert attempt.end() == attempt.expected


@pytest.mark.parametrize("stage", ["brought", "coldstart"])
def test_a_stage_killed_at_every_single_write_ends_with_the_same_bytes(nursery, finished, tmp_path, stage):
    attempt = Attempt(nursery, finished, tmp_path, stage)
    for fatal in range(1, 100):
        process = attempt.start(fatal)
        process.join(200)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert 3 < fatal < 99
    assert attempt.end() == attempt.expected


@pytest.mark.parametrize("stage", ["dev1", "zero"])
def test_a_stage_killed_while_it_writes_its_checkpoint_ends_with_the_same_bytes(
    nursery, finished, tmp_path, stage
):
    attempt = Attempt(nursery, finished, tmp_path, stage)
    for fatal in (4, 5, 9):  # within one save: record, state, rename
        process = attempt.start(fatal)
        process.join(200)
        assert process.exitcode == -signal.SIGKILL
    assert attempt.end() == attempt.expected


def stopped(request: dict, answer_to: str) -> None:
    """Carry a stage out while somebody asks it to stop from the very beginning."""
    import torch

    torch.set_num_threads(1)
    stop = threading.Event()
    stop.set()
    Path(answer_to).write_text(json.dumps(run_job(read_job(request, stop))))


@pytest.mark.parametrize("stage", ["evaluation/zero", "traces", "dev1"])
def test_a_stage_asked_to_stop_again_and_again_stops_soon_and_ends_with_the_same_bytes(
    nursery, finished, tmp_path, stage
):
    attempt = Attempt(nursery, finished, tmp_path, stage)
    events = []
    while not events or events[-1] != "done":
        process = nursery.Process(target=stopped, args=(attempt.request, str(attempt.answer_to)))
        process.start()
        process.join(200)
        events.append(json.loads(attempt.answer_to.read_text())["event"])
    assert len(events) > 1
    assert attempt.end() == attempt.expected


def on_a_machine_that_chose_otherwise(request: dict, answer_to: str) -> None:
    """Carry a stage out where plain torch was faster at everything."""
    import torch

    from limbeck.model.kernels import choice

    torch.set_num_threads(1)
    choice._find = lambda threads: choice._choices.setdefault(threads, choice.Choice.all(False))
    Path(answer_to).write_text(json.dumps(run_job(read_job(request, threading.Event()))))


@pytest.mark.skipif(kernels.library() is None, reason="there is nothing to choose from")
def test_a_killed_stage_goes_on_with_the_kernels_it_began_with(nursery, finished, tmp_path):
    """Also where the cache is gone and another choice would be made: they round differently."""
    attempt = Attempt(nursery, finished, tmp_path, "dev1")
    folder = Path(attempt.request["folder"])
    process = attempt.start()
    until(lambda: (folder / "state.pt").exists() or not process.is_alive())
    process.kill()
    process.join()
    assert json.loads((folder / KERNELS).read_text())["instructions"] == kernels.instructions()
    process = nursery.Process(
        target=on_a_machine_that_chose_otherwise, args=(attempt.request, str(attempt.answer_to))
    )
    process.start()
    process.join(200)
    outcome = json.loads(attempt.answer_to.read_text())["outcome"]
    assert outcome["kernels"]["instructions"] == kernels.instructions()
    assert attempt.end() == attempt.expected


@pytest.mark.skipif(kernels.library() is None, reason="there is nothing to choose from")
def test_a_run_that_goes_on_with_other_kernels_says_so(nursery, finished, tmp_path):
    attempt = Attempt(nursery, finished, tmp_path, "dev1")
    folder = Path(attempt.request["folder"])
    (folder / KERNELS).write_text(
        json.dumps({"instructions": "AVX9", "library": "kernels-of-another-processor"})
    )
    code, _, errors = answer("run", finished.recipe, "--runs", tmp_path / "runs", "--auto")
    assert code == 0
    assert (
        f"dev1: it began with other kernels "
        f"(AVX9, kernels-of-another-processor; here {kernels.instructions()}" in errors
    )
    manifest = json.loads(
        (attempt.run.store.find(attempt.node.kind, attempt.node.key).folder / "manifest.json").read_text()
    )
    assert (
        manifest["kernels"]["instructions"] == kernels.instructions()
        and manifest["kernels"]["before"]["instructions"] == "AVX9"
    )


# ---------------------------------------------------------------- whole runs


def test_a_run_killed_and_stopped_again_and_again_ends_with_the_same_artifacts_and_leaves_no_process(
    finished, tmp_path
):
    instants, workers, ended = random.Random(0), set(), []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        run = limbeck("run", finished.recipe, "--runs", tmp_path)
        until(lambda: children(run.pid) or run.poll() is not None)  # noqa: B023
        workers |= set(children(run.pid))
        time.sleep(instants.uniform(1.5, 4))
        if run.poll() is None:
            run.send_signal(number)
        _, err = run.communicate(timeout=200)
        assert "Traceback" not in err
        ended.append(run.returncode)
    assert -signal.SIGKILL in ended and set(ended) <= {0, 75, -signal.SIGKILL}
    code, _, err = answer("run", finished.recipe, "--runs", tmp_path)
    assert (code, digests(tmp_path)) == (0, digests(finished.home)), err
    assert (tmp_path / "tiny" / "report" / "index.html").exists()
    until(lambda: not any(map(alive, workers)), 20)


def test_two_runs_of_one_recipe_share_their_work(finished, tmp_path):
    runs = [limbeck("run", finished.recipe, "--runs", tmp_path) for _ in range(2)]
    ends = [(run.communicate(timeout=400)[1], run.returncode) for run in runs]
    assert [code for _, code in ends] == [0, 0], ends
    assert digests(tmp_path) == digests(finished.home)


@pytest.fixture
def long(finished) -> list[str]:
    """Settings that make the tiny base take half a minute, and save only when asked to."""
    return ["--set", "stages.base.tokens=300000", "--set", "stages.base.save_every=600"]


@pytest.mark.parametrize("presses, expected", [(1, 75), (2, 130)])
def test_ctrl_c_once_checkpoints_and_says_how_to_go_on_and_twice_stops_at_once(
    finished, tmp_path, long, presses, expected
):
    run = limbeck("run", finished.recipe, "--runs", tmp_path, *long)
    until(lambda: list(tmp_path.glob("store/.partial/pretrain-*/metrics.jsonl")))
    workers = children(run.pid)
    if presses == 2:  # a stage that cannot checkpoint before the second one
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
    for _ in range(presses):
        run.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, err = run.communicate(timeout=200)
    assert run.returncode == expected, err
    until(lambda: not any(map(alive, workers)), 20)
    assert "Traceback" not in err
    if presses == 1:
        assert list(tmp_path.glob("store/.partial/pretrain-*/state.pt"))
        assert err.splitlines()[-1] == "limbeck: stopped; the same command goes on from here"


def test_a_worker_that_the_system_kills_ends_the_run_resumably(finished, tmp_path, long):
    run = limbeck("run", finished.recipe, "--runs", tmp_path, *long)
    until(lambda: list(tmp_path.glob("store/.partial/pretrain-*/metrics.jsonl")))
    os.kill(children(run.pid)[0], signal.SIGKILL)
    _, err = run.communicate(timeout=200)
    assert run.returncode == 75
    assert "stage base: its process was killed (signal 9; out of memory?); run again" in err


def test_when_one_stage_fails_those_beside_it_checkpoint_first(finished, tmp_path, long):
    recipe = tmp_path / "two.yaml"
    text = finished.recipe.read_text().replace("{kind: load, path: model}", "{kind: load, path: broken}")
    recipe.write_text(text)
    shutil.copytree(finished.recipe.parent / "model", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    code, _, err = answer("run", recipe, "--runs", tmp_path / "runs", "--set", "workers=2", *long)
    assert code == 2
    assert err.splitlines()[-1].startswith("limbeck: stage brought: ")
    assert "model.safetensors" in err.splitlines()[-1]
    assert list(tmp_path.glob("runs/store/.partial/pretrain-*/state.pt"))
