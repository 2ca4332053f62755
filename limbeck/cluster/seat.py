"""A seat: a process that samples and grades shards, with an engine of its own.

    python -m limbeck.cluster.seat DESCRIPTOR THREADS FOLDER

A request has everything that its answer depends on: the folder of the weights, problems with the token ids
of their prompts, sampling parameters, seed. So any seat may answer any request, twice if need be. When the
stage's process dies, the connection ends, and the seat removes `FOLDER`, the weights that were handed over,
and exits at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from ..activity import Phase, phase
from ..config.recipe import Problems
from ..engine.rollout import Engine
from ..model import kernels, weights
from ..model.checksum import checksum
from ..model.ops import place
from ..tasks.registry import open_task
from ..text.tokenizer import Tokenizer
from ..types import Group, LimbeckError, Task
from .messages import Arrays, Seed, pack, read_problem, read_prompts, read_sampling, unpack, write_groups

BEAT = 1.0  # seconds between two signs of life while a seat works


class Seat:
    """The engines of a seat, by the sampler that they belong to, and its tasks."""

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}
        self.versions: dict[str, tuple[str, str]] = {}  # the folder of an engine's weights, their checksum
        self.tasks: dict[str, Task] = {}
        self.sources: dict[str, Any] = {}

    def answer(self, request: bytes, progress: Callable[[int], None] | None = None) -> bytes:
        """Return the answer to a request: the completions of its shard, or why there are none. `progress(1)`
        is called for each finished completion."""
        header, prompts = unpack(request)
        number = header["number"]
        try:
            found, arrays = self._roll(header, read_prompts(prompts), progress)
        except LimbeckError as error:
            return pack({"number": number, "error": str(error), "code": error.exit_code})
        except Exception:  # noqa: BLE001 - the stage reports it, as if it had happened there
            return pack({"number": number, "fault": traceback.format_exc()})
        return pack({"number": number, **found}, arrays)

    def _roll(
        self, header: dict[str, Any], prompts: list[np.ndarray], progress: Callable[[int], None] | None
    ) -> tuple[dict[str, Any], Arrays]:
        """Sample and grade a shard; return the header and the arrays of the answer."""
        self.forget(header["samplers"])
        engine = self._engine(header["sampler"], header["model"])
        engine.rows = header["rows"]
        problems = [read_problem(fields) for fields in header["problems"]]
        sampling = read_sampling(header["sampling"])
        seed = Seed(header["seed"])
        groups = engine.sample(problems, prompts, header["size"], sampling, seed, progress)
        plain = [fields["plain"] for fields in header["problems"]]
        self._open_tasks(header["sources"])
        groups = [self._grade(group) if ready else group for group, ready in zip(groups, plain, strict=True)]
        found, arrays = write_groups(groups)
        usage = {"drafted": engine.drafted, "accepted": engine.accepted}
        engine.take_usage()
        return {**found, **usage, "weights": self.versions[header["sampler"]][1]}, arrays

    def forget(self, samplers: list[str]) -> None:
        """Drop the engines of all but these samplers."""
        for name in set(self.engines) - set(samplers):
            del self.engines[name]
            self.versions.pop(name, None)

    def _engine(self, sampler: str, model: dict[str, Any]) -> Engine:
        """Return the engine of a sampler, with the weights of the folder that the request names."""
        folder = Path(model["folder"])
        if self.versions.get(sampler, ("",))[0] == model["folder"]:
            return self.engines[sampler]
        self.versions.pop(sampler, None)  # whole weights, or none
        if kernels.adopt(model["kernels"]):
            raise LimbeckError(
                "hosts: a seat's machine has other kernels than the stage's, which round differently; "
                "take machines of one kind"
            )
        if sampler in self.engines:
            weights.fill(self.engines[sampler].model, folder)
        else:
            decoder = place(weights.load(folder, getattr(torch, model["dtype"])), "cpu")
            tokenizer = Tokenizer.from_directory(folder)
            self.engines[sampler] = Engine(decoder, tokenizer, speculate=model["speculate"])
        engine = self.engines[sampler]
        self.versions[sampler] = (model["folder"], checksum(engine.model))
        return engine

    def _open_tasks(self, sources: dict[str, Any]) -> None:
        """Open the tasks of a stage, unless they are open."""
        if sources == self.sources:
            return
        settings = TypeAdapter(dict[str, Problems]).validate_python(sources)
        self.tasks = {name: open_task(name, one) for name, one in settings.items()}
        self.sources = sources

    def _grade(self, group: Group) -> Group:
        """Return the group with its scores; as it is if no task of the stage can score it, which the stage
        then tries itself."""
        task = self.tasks.get(group.problem.id.partition("/")[0])
        if task is None:
            return group
        try:
            scores = tuple(task.score(group.problem, completion) for completion in group.completions)
        except Exception:  # noqa: BLE001 - not a problem of this task, for all that its name says
            return group
        return replace(group, scores=scores)


class Line:
    """The connection of a seat with its stage. Messages of several threads do not mix."""

    def __init__(self, connection: Connection, folder: Path):
        self.connection = connection
        self.folder = folder
        self.requests: SimpleQueue[bytes] = SimpleQueue()
        self._lock = threading.Lock()

    def send(self, message: bytes) -> None:
        """Send a message; end the process if nobody listens any more."""
        try:
            with self._lock:
                self.connection.send_bytes(message)
        except OSError:
            self._leave()

    def listen(self) -> None:
        """Put requests into the queue until the connection ends, then end the process."""
        with suppress(EOFError, OSError):
            while True:
                self.requests.put(self.connection.recv_bytes())
        self._leave()

    def beat(self, shard: Shard) -> None:
        """Tell every `BEAT` seconds how far the present shard is."""
        while not shard.done.wait(BEAT):
            self.send(pack({"beat": shard.number, "rows": shard.rows, "tokens": shard.work.tokens}))

    def _leave(self) -> None:
        """End the process, without the weights that were handed over."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)


class Shard:
    """How far a shard is: its number, finished rows, and the phase that counts its tokens."""

    def __init__(self, number: int, work: Phase):
        self.number = number
        self.work = work
        self.rows = 0
        self.done = threading.Event()

    def advance(self, rows: int) -> None:
        """Add finished rows."""
        self.rows += rows


def main(descriptor: int, threads: int, folder: Path) -> None:
    """Answer requests, one after the other, for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the run, which asks the stage to stop
    torch.set_num_threads(threads)
    line = Line(Connection(descriptor), folder)
    threading.Thread(target=line.listen, daemon=True).start()
    line.send(pack({"ready": os.getpid()}))
    seat = Seat()
    while True:
        request = line.requests.get()
        header, _ = unpack(request)
        if "number" not in header:  # no shard: what the seat need not remember
            seat.forget(header["samplers"])
            continue
        with phase("shard") as work:
            shard = Shard(header["number"], work)
            threading.Thread(target=line.beat, args=(shard,), daemon=True).start()
            answer = seat.answer(request, shard.advance)
            shard.done.set()
        line.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
