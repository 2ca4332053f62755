"""Checkpoints of a stage that may be killed at any instant: one file, whole or not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from ..files import atomic_write
from ..types import Resumable


class Synced(Protocol):
    """A log that can be forced to disk."""

    def sync(self) -> None:
        """Force to disk what was written."""


class Checkpoint:
    """Keeps `state.pt` in a stage's folder, at most `every` seconds old, and stops the stage on request.

    The log is synced before the state is renamed into place, so a state never stands for steps that the log
    has lost; log rows beyond the state are dropped on resume."""

    def __init__(self, folder: Path, every: float = 60, stopping: Callable[[], bool] = lambda: False):
        self.path = folder / "state.pt"
        self.every = every
        self.stopping = stopping
        self._saved = time.monotonic()

    def restore(self) -> dict[str, Any] | None:
        """The last state, or None at the beginning. Read it once: it is as large as the weights and their
        moments."""
        return torch.load(self.path, weights_only=True) if self.path.exists() else None

    def offer(self, state: Callable[[], dict[str, Any]], log: Synced) -> None:
        """Save if the last save is `every` seconds ago, or if the run is to stop: then raise Resumable."""
        stop = self.stopping()
        if not stop and time.monotonic() - self._saved < self.every:
            return
        log.sync()
        with atomic_write(self.path) as file:
            torch.save(state(), file)
        self._saved = time.monotonic()
        if stop:
            raise Resumable("stopped after a checkpoint; the same command goes on from here")

    def clear(self) -> None:
        """Remove the state of a stage that has ended."""
        self.path.unlink(missing_ok=True)
