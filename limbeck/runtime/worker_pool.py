"""The pool of worker processes on this machine that stages run in."""

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
    """A pool of `workers` worker processes on this machine, which share its CPU cores. A process is started
    when it is first needed."""

    def __init__(self, workers: int, threads: int = 0):
        """Set up a pool without starting processes. `threads` is the number of threads of each process; 0
        divides the usable cores by `workers`."""
        self.threads = threads or max(1, int(usable_cores()) // workers)
        self.size = workers
        self._events: SimpleQueue[tuple[subprocess.Popen, dict[str, Any] | None]] = SimpleQueue()
        self._idle: list[subprocess.Popen] = []
        self._busy: dict[str, subprocess.Popen] = {}

    @property
    def free(self) -> int:
        """The number of stages that can be started now."""
        return self.size - len(self._busy)

    @property
    def busy(self) -> list[str]:
        """The names of the running stages."""
        return list(self._busy)

    def start(self, request: dict[str, Any]) -> None:
        """Send a job, as the JSON object of `write_job`, to an idle or a new worker."""
        worker = self._idle.pop() if self._idle else self._spawn()
        self._busy[request["name"]] = worker
        self._send(worker, request)

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """Return the next event of a worker, or None if there is none within `seconds`.

        If a worker dies during a stage, the event is `died`. After the event `told` (a message for the user)
        the worker is still busy; after `broken` it ends; after any other event it is idle.
        """
        try:
            worker, event = self._events.get(timeout=seconds)
        except Empty:
            return None
        if event is None:
            return self._bury(worker)
        if event["event"] != "told":
            self._busy.pop(event["name"])
            if event["event"] != "broken":
                self._idle.append(worker)
        return event

    def _bury(self, worker: subprocess.Popen) -> dict[str, Any] | None:
        """Remove a dead worker from the pool. Return the event `died` if it was running a stage, else
        None."""
        self._idle = [other for other in self._idle if other is not worker]
        for name, busy in self._busy.items():
            if busy is worker:
                del self._busy[name]
                return {"event": "died", "name": name, "status": worker.returncode}
        return None

    def stop(self) -> None:
        """Ask every busy worker to write a checkpoint and end its stage."""
        for worker in self._busy.values():
            self._send(worker, {"stop": True})

    def close(self) -> None:
        """Kill all workers and wait until they have ended."""
        self.kill()
        for worker in [*self._idle, *self._busy.values()]:
            worker.wait()
        self._idle = []
        self._busy = {}

    def kill(self) -> None:
        """Kill all workers without waiting. Safe to call from a signal handler."""
        for worker in [*self._idle, *self._busy.values()]:
            worker.kill()

    def _spawn(self) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONHASHSEED": "0"}
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable products on a card
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
        """Put each event of a worker into the queue, and None when the worker has died."""
        for line in worker.stdout:
            self._events.put((worker, json.loads(line)))
        worker.wait()
        self._events.put((worker, None))

    @staticmethod
    def _send(worker: subprocess.Popen, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the worker's death is an event of its own
            worker.stdin.write(json.dumps(message) + "\n")
            worker.stdin.flush()
