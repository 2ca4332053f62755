"""Where stages run: worker processes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from queue import Empty, SimpleQueue
from typing import Any


class Host:
    """`workers` processes on this machine, each with its share of the cores; started when first needed."""

    def __init__(self, workers: int, threads: int = 0):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = threads or max(1, cores // workers)
        self.size = workers
        self._events: SimpleQueue[dict[str, Any]] = SimpleQueue()
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
        """The next event, or None when nothing happened in time."""
        try:
            event = self._events.get(timeout=seconds)
        except Empty:
            return None
        worker = self._busy.pop(event["name"], None)
        if worker and event["event"] != "died":
            self._idle.append(worker)
        return event

    def stop(self) -> None:
        """Ask every worker to checkpoint and let go."""
        for worker in self._busy.values():
            self._tell(worker, {"stop": True})

    def close(self) -> None:
        """End all workers, now."""
        for worker in [*self._idle, *self._busy.values()]:
            worker.kill()
            worker.wait()
        self._idle, self._busy = [], {}

    def _spawn(self) -> subprocess.Popen:
        # glibc gives freed tensors back to the system and takes them again, page by page, each step
        environment = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31), **os.environ}
        environment |= {"OMP_NUM_THREADS": str(self.threads), "PYTHONHASHSEED": "0"}
        worker = subprocess.Popen(
            [sys.executable, "-m", "limbeck.cluster.worker", str(self.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: subprocess.Popen) -> None:
        for line in worker.stdout:
            self._events.put(json.loads(line))
        worker.wait()
        for name, busy in list(self._busy.items()):
            if busy is worker:
                self._events.put({"event": "died", "name": name, "signal": -worker.returncode})

    @staticmethod
    def _tell(worker: subprocess.Popen, message: dict[str, Any]) -> None:
        try:
            worker.stdin.write(json.dumps(message) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            pass  # its death is an event of its own
