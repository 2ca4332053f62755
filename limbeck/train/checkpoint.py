"""Checkpoints of a stage that may be killed at any moment. A checkpoint is one file that is either complete
or absent."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from ..activity import phase
from ..files import atomic_write
from ..types import Resumable


class Synced(Protocol):
    """A log whose content can be forced to disk."""

    def sync(self) -> None:
        """Force everything that was written so far to disk."""


class Checkpoint:
    """Saves the state of a running stage in `state.pt` in the stage's folder, and stops the stage on
    request.

    A state is saved at most once in `every` seconds, and after the last step if `final`. `stopping` returns
    True if the run has been asked to stop. The log is forced to disk before the new state replaces the old
    one, so the log always holds every step up to the state; log rows after the state are dropped on
    resume."""

    def __init__(
        self,
        folder: Path,
        every: float = 60,
        stopping: Callable[[], bool] = lambda: False,
        final: bool = False,
    ):
        self.path = folder / "state.pt"
        self.final = final
        self.every = every
        self.stopping = stopping
        self._saved = time.monotonic()

    def restore(self) -> dict[str, Any] | None:
        """Load the last saved state; None if there is none. Call it only once: the state holds the weights
        and the optimizer's moments, and is as large as they are; it lies on the CPU."""
        if not self.path.exists():
            return None
        with phase("reading the checkpoint"):
            return torch.load(self.path, "cpu", weights_only=True)

    def offer(self, state: Callable[[], dict[str, Any]], log: Synced) -> None:
        """Save the state if the last save is at least `every` seconds ago, or if the run has been asked to
        stop.

        `state` is a function that returns the state, called only when the state is saved. Raises Resumable
        after the save if the run has been asked to stop."""
        stop = self.stopping()
        if not stop and time.monotonic() - self._saved < self.every:
            return
        self.save(state, log)
        if stop:
            raise Resumable("stopped after a checkpoint; the same command goes on from here")

    def finish(self, state: Callable[[], dict[str, Any]], log: Synced) -> None:
        """Save the state after the last step, if it is wanted. `state` and `log` are as in `offer`."""
        if self.final:
            self.save(state, log)

    def save(self, state: Callable[[], dict[str, Any]], log: Synced) -> None:
        """Force the log to disk, then replace the saved state."""
        log.sync()
        with phase("saving a checkpoint"), atomic_write(self.path) as file:
            torch.save(state(), file)
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Delete the saved state. Called when the stage has ended."""
        self.path.unlink(missing_ok=True)
