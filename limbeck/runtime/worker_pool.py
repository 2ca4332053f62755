"""Where stages run: worker processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from queue import Empty, SimpleQueue
from typing import Any

from .machine import usable_cores


class Host:
    """`workers` processes on this machine, each with its share of the cores; started when first needed."""

    def __init__(self, workers: int, threads: int = 0):
        self.threads = threads or max(1, int(usable_cores()) // workers)
        self.size = workers
        self._events: SimpleQueue[tuple[subprocess.Popen, dict[str, Any] | None]] = SimpleQueue()
        self._idle: list[subprocess.Popen] = []
        self._busy: dict[str, subprocess.Popen] = {}

    @property
    def free(self) -> int:
        return self.size - len(self._busy)

    @property
    def busy(self) -> list[str]:
        return list(self._busy)

    def start(self, request: dict[str, Any]) -> None:
        """Hand a stage to a worker."""
        worker = self._idle.pop() if self._idle else self._spawn()
        self._busy[request["name"]] = worker
        self._tell(worker, request)

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """The next event, or None when nothing happened in time. A worker's death is one if it had work; what it tells on
        the way leaves it at work."""
        try:
            worker, event = self._events.get(timeout=seconds)
        except Empty:
            return None
        if event and event["event"] == "told":
            return event
        if event is None:
            self._idle = [other for other in self._idle if other is not worker]
            name = next((name for name, busy in self._busy.items() if busy is worker), None)
            event = name and {"event": "died", "name": name, "status": worker.returncode}
        else:
            self._idle.append(worker)
        if event:
            self._busy.pop(event["name"])
        return event

    def stop(self) -> None:
        """Ask every worker to checkpoint and let go."""
        for worker in self._busy.values():
            self._tell(worker, {"stop": True})

    def close(self) -> None:
        """End all workers, now."""
        self.kill()
        for worker in [*self._idle, *self._busy.values()]:
            worker.wait()
        self._idle, self._busy = [], {}

    def kill(self) -> None:
        """The part of `close` that a signal handler may call: it waits for nobody."""
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
        for line in worker.stdout:
            self._events.put((worker, json.loads(line)))
        worker.wait()
        self._events.put((worker, None))

    @staticmethod
    def _tell(worker: subprocess.Popen, message: dict[str, Any]) -> None:
        try:
            worker.stdin.write(json.dumps(message) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            pass  # its death is an event of its own
