"""Worker processes on this machine, which stages run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from .machine import usable_cores


class WorkerPool:
    """`workers` processes on this machine, each with its share of the cores; started when first needed."""

    def __init__(self, workers: int, threads: int = 0):
        """`threads` are those of each process; 0 divides the usable cores."""
        self.threads = threads or max(1, int(usable_cores()) // workers)
        self.size = workers
        self._events: SimpleQueue[tuple[subprocess.Popen, dict[str, Any] | None]] = SimpleQueue()
        self._idle: list[subprocess.Popen] = []
        self._busy: dict[str, subprocess.Popen] = {}

    @property
    def free(self) -> int:
        """The number of stages that can be started."""
        return self.size - len(self._busy)

    @property
    def busy(self) -> list[str]:
        """The names of the running stages."""
        return list(self._busy)

    def start(self, request: dict[str, Any]) -> None:
        """Hand a job, as JSON, to a worker."""
        worker = self._idle.pop() if self._idle else self._spawn()
        self._busy[request["name"]] = worker
        self._send(worker, request)

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """The next event, or None after `seconds` without one. The death of a busy worker is an event `died`;
        after an event `told` the worker is still busy."""
        try:
            worker, event = self._events.get(timeout=seconds)
        except Empty:
            return None
        if event is None:
            return self._bury(worker)
        if event["event"] != "told":
            self._idle.append(worker)
            self._busy.pop(event["name"])
        return event

    def _bury(self, worker: subprocess.Popen) -> dict[str, Any] | None:
        """Forget a dead worker; return the event `died` if it was busy."""
        self._idle = [other for other in self._idle if other is not worker]
        for name, busy in self._busy.items():
            if busy is worker:
                del self._busy[name]
                return {"event": "died", "name": name, "status": worker.returncode}
        return None

    def stop(self) -> None:
        """Ask every busy worker to checkpoint and end its stage."""
        for worker in self._busy.values():
            self._send(worker, {"stop": True})

    def close(self) -> None:
        """Kill all workers and wait for their end."""
        self.kill()
        for worker in [*self._idle, *self._busy.values()]:
            worker.wait()
        self._idle = []
        self._busy = {}

    def kill(self) -> None:
        """Kill all workers without waiting; a signal handler may call this."""
        for worker in [*self._idle, *self._busy.values()]:
            worker.kill()

    def _spawn(self) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONHASHSEED": "0"}
        worker = subprocess.Popen(
            [sys.executable, "-m", "limbeck.pipeline.worker", str(self.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: subprocess.Popen) -> None:
        """Queue the events of a worker, and None for its death."""
        for line in worker.stdout:
            self._events.put((worker, json.loads(line)))
        worker.wait()
        self._events.put((worker, None))

    @staticmethod
    def _send(worker: subprocess.Popen, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the worker's death is an event of its own
            worker.stdin.write(json.dumps(message) + "\n")
            worker.stdin.flush()
