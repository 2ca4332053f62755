"""Progress of a stage that may be killed at any instant: one file, whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..run_log import Record
from ..types import Resumable


class Checkpoint:
    """Keeps `state.pt` in a stage's folder, at most `every` seconds old, and obeys a request to stop.

    The history is synced before the state is renamed into place, so a state never stands for steps that the
    record has lost; rows beyond it are forgotten on resume.
    """

    def __init__(self, folder: Path, every: float = 60, stopping: Callable[[], bool] = lambda: False):
        self.path, self.every, self.stopping = folder / "state.pt", every, stopping
        self._saved = time.monotonic()

    def restore(self) -> dict[str, Any] | None:
        """The last state, or None at the beginning."""
        return torch.load(self.path, weights_only=True) if self.path.exists() else None

    def offer(self, state: Callable[[], dict[str, Any]], record: Record) -> None:
        """Save if it is time, or if the run is to stop; then leave by `Resumable`."""
        stop = self.stopping()
        if not stop and time.monotonic() - self._saved < self.every:
            return
        record.sync()
        save(state(), self.path)
        self._saved = time.monotonic()
        if stop:
            raise Resumable("stopped after a checkpoint; the same command goes on from here")

    def clear(self) -> None:
        """Forget the state of a stage that has ended, and what a kill left of one being written."""
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".partial").unlink(missing_ok=True)


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside, force to disk, rename: a kill or a full disk leaves the old state."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
