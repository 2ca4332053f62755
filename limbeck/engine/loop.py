"""The thread of the engine, on which all models of a server run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from ..model.ops import devices
from .scheduler import Scheduler


class EngineThread:
    """The only thread of a server that runs models. It runs one round of every scheduler that has requests,
    one scheduler after another.

    One thread is used because torch keeps a pool of worker threads for every thread that computes. Two models
    on two threads would compete for the same cores, and so would a thread that has merely loaded a model:
    where pool threads outnumber cores they sleep after every loop instead of spinning until the next, which
    makes a decode step take up to twice as long.

    `device` is the name of what the models lie on (model/ops/devices.py). If it fails so that this process
    cannot use it any more, the thread ends: `failure` is the error then, and `on_failure` is called.
    """

    def __init__(self, schedulers: Sequence[Scheduler], device: str = "cpu"):
        self.schedulers = list(schedulers)
        self.device = device
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.closing = False
        self.lock = threading.Condition()
        for scheduler in self.schedulers:
            scheduler.lock = self.lock
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which then runs the schedulers until `close` is called."""
        self.thread.start()

    def close(self) -> None:
        """Stop the thread after its current round and wait for it to end. All requests that are waiting or
        running fail."""
        with self.lock:
            self.closing = True
            self.lock.notify()
        self.thread.join()

    def _run(self) -> None:
        devices.prepare(self.device)  # which card is meant is known to each thread by itself
        with torch.inference_mode():
            try:
                self._serve()
            except Exception as error:
                if not devices.poisoned(error):
                    raise
                self.failure = error
            for scheduler in self.schedulers:
                scheduler.close()
        if self.failure:
            self.on_failure()

    def _serve(self) -> None:
        """Run rounds until the thread is closed. Raises the error of a device that has failed."""
        while not self.closing:
            with self.lock:
                self.lock.wait_for(self._has_work)
            for scheduler in self.schedulers:
                if scheduler.has_work:
                    scheduler.try_round()

    def _has_work(self) -> bool:
        return self.closing or any(scheduler.has_work for scheduler in self.schedulers)
