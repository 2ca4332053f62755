"""A recipe with every kind of stage that runs in seconds, and hands to run, watch and kill it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from limbeck.config.load import load
from limbeck.pipeline.graph import Node
from limbeck.pipeline.run import Run
from limbeck.pipeline.worker import read_job, run_job, write_job

# half-learned repetition is right now and then: `screened` needs problems that are sometimes solved
RECIPE = """
name: tiny
threads: 1
problems:
  clock: &clock {source: miniature, modulus: 3, numbers: 3, largest: 2}
  chat: {<<: *clock, task: repeat}
stages:
  brought: {kind: load, path: model}
  base:
    kind: pretrain
    problems: clock
    corpus: {textbook: 0, general: 0.9, plain: 0, tagged: 0.7, guessed: 0, slip: 0, misjudged: 0}
    tokens: 24000
    batch_tokens: 512
    optimizer: {name: muon, learning_rate: 0.02, warmup_steps: 5}
    shape: &shape {hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64}
    log_every: 1
    save_every: 0.01
  zero:
    kind: rl
    model: base
    problems: {clock: 1}
    rewards: {accuracy: 1, format: 0.2, language: 0.5}
    steps: 8
    policy: {prompts_per_step: 4, group_size: 4, kl_coef: 0.01, reference_every: 4, updates_per_rollout: 2}
    sampling: {max_new_tokens: 24}
    log_every: 1
    save_every: 0.01
  screened: {kind: screen, model: base, problems: {chat: 1}, limit: 192, samples: 4,
             sampling: {max_new_tokens: 24}}
  traces:
    kind: sample
    model: base
    problems: {clock: 1}
    prompts: 192
    samples: 2
    correct: false
    wellformed: false
    sampling: {max_new_tokens: 24}
  coldstart: {kind: curate, rows: traces, policy: translate, auto: true}
  general: {kind: general, problems: chat, rows: 40}
  dev1:
    kind: sft
    model: base
    rows: {coldstart: 0.5, general: 1}
    batch_tokens: 256
    log_every: 1
    save_every: 0.01
  evaluation: {kind: evaluate, models: [zero], problems: [clock], prompts: 32, max_new_tokens: 24}
  report: {kind: report, evaluation: evaluation}
"""


class Silent:
    """A display that says nothing."""

    def show(self, graph, running) -> None: ...

    def finished(self, node, artifact) -> None: ...

    def say(self, text: str) -> None: ...


def open_run(recipe: Path, home: Path, *overrides: str) -> Run:
    """A run as `limbeck run` would open it, not carried out."""
    return Run(load(recipe, overrides), recipe.parent, home, Silent())


def carry_out(run: Run, device: str, last: str = "") -> dict[str, Node]:
    """Stages by name, carried out on a device in this process, to the stage `last` or to the end."""
    from limbeck.pipeline.stages import STAGES

    run.graph.check_contamination()
    while ready := [node for node in run.graph.nodes.values() if node.state == "ready"]:
        node = ready[0]
        job = replace(run._job(node), device=device)
        outcome = STAGES[node.kind](job)
        manifest = run._manifest(node, {**outcome, "seconds": 0, "peak_memory_bytes": 0})
        run.store.finish(job.folder, manifest)
        run.graph.refresh()
        if node.name == last:
            break
    return run.graph.nodes


def limbeck(*arguments: object, **options) -> subprocess.Popen:
    """The command, started: its output and its errors are pipes."""
    command = [sys.executable, "-c", "from limbeck.cli import main; main()", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **{**streams, "text": True, **options})


def answer(*arguments: object, **options) -> tuple[int, str, str]:
    """The command, carried out: exit code, output, errors."""
    process = limbeck(*arguments, **options)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def digests(home: Path) -> dict[str, str]:
    """Folder (kind and key) -> digest of every artifact."""
    manifests = (home / "store").glob("*/manifest.json")
    return {path.parent.name: json.loads(path.read_text())["digest"] for path in manifests}


def children(pid: int) -> list[int]:
    """Processes that `pid` started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not asked for its status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], object], seconds: float = 200) -> None:
    """Wait for something that is about to happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **changes}


def child(request: dict, answer_to: str, fatal: int) -> None:
    """Carry one stage out; die by SIGKILL at the `fatal`-th time that something is forced to disk or
    renamed."""
    import torch

    torch.set_num_threads(1)
    left = [fatal]

    def deadly(call):
        def wrapped(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    event = run_job(read_job(request, threading.Event()))
    Path(answer_to).write_text(json.dumps(event))


class Attempt:
    """One stage of the finished run, to be made anew in a copy of its store."""

    def __init__(self, nursery, finished, folder: Path, stage: str, *overrides: str):
        self.nursery, self.answer_to = nursery, folder / "event.json"
        shutil.copytree(finished.home, folder / "runs")
        self.run = open_run(finished.recipe, folder / "runs", *overrides)
        artifact = self.run.graph.nodes[stage].artifact
        self.expected, self.seconds = artifact.digest, artifact.manifest["seconds"]
        shutil.rmtree(artifact.folder)
        self.run = open_run(finished.recipe, folder / "runs", *overrides)
        self.node = self.run.graph.nodes[stage]
        self.request = write_job(self.run._job(self.node))

    def start(self, fatal: int = 0):
        process = self.nursery.Process(target=child, args=(self.request, str(self.answer_to), fatal))
        process.start()
        return process

    def end(self) -> str:
        """Without a kill, to the end; the digest of what came of it."""
        process = self.start()
        process.join(200)
        event = json.loads(self.answer_to.read_text())
        assert event["event"] == "done", event
        manifest = self.run._manifest(self.node, event["outcome"])
        return self.run.store.finish(self.run.store.partial(self.node.kind, self.node.key), manifest).digest


class Output(NamedTuple):
    """What a command ended with: its exit code, its output, its errors."""

    code: int
    out: str
    err: str
