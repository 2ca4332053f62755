"""A stage's record as it grows: columns of numbers, the steps whose responses were written down, and the pace.

Each look reads on where the last one stopped, so that watching a run of a hundred thousand steps costs what has come since.
"""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..run_log import METRICS, ROLLOUTS, TIMING, Tail
from .series import cuts, means, running_mean

RECENT = 10  # rows of timing that the pace is taken from


@dataclass(frozen=True)
class Shown:
    """One group that was written down: `Shown(40, 18211, "clock/156-3", "use 6 1 5 make 3 ?", 0.25)`.

    `place` is where its line begins in the file; `right` is the share of its responses that were right.
    """

    step: int
    place: int
    problem: str
    prompt: str
    right: float


class History:
    """`History(folder).look()`; a folder that holds no record has none. Several threads may look."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tails = {name: Tail(folder / name) for name in (METRICS, ROLLOUTS, TIMING)}
        self._lock = threading.Lock()
        self._forget(METRICS), self._forget(ROLLOUTS), self._forget(TIMING)

    def look(self) -> History:
        """Read what has come since; returns itself."""
        with self._lock:
            for name, take in ((METRICS, self._metrics), (ROLLOUTS, self._rollout), (TIMING, self._timing)):
                anew, lines = self._tails[name].more()
                if anew:
                    self._forget(name)
                for place, line in lines:
                    take(place, json.loads(line))
        return self

    def _forget(self, name: str) -> None:
        if name == METRICS:
            self.steps: list[int] = []
            self.columns: dict[str, list[float]] = {}
            self.alarms: list[tuple[int, str]] = []
            self.loads: list[list[float]] = []  # of experts: latest step, layer by layer
            self.notes: list[dict[str, Any]] = []  # rows that are more words than numbers
        elif name == ROLLOUTS:
            self.shown: list[Shown] = []
        else:
            self.timed: list[tuple[int, float]] = []
            self.total: int | None = None

    def _metrics(self, place: int, row: dict[str, Any]) -> None:
        before = len(self.steps)
        self.steps.append(row.pop("step"))
        self.alarms += [(self.steps[-1], str(alarm)) for alarm in row.pop("alarms", ())]
        self.loads = row.pop("expert_loads", self.loads)
        if any(isinstance(value, str) for value in row.values()):
            self.notes.append(row)
        for name, value in row.items():
            if isinstance(value, int | float) or value is None:
                self.columns.setdefault(name, [math.nan] * before).append(
                    math.nan if value is None else float(value)
                )
        for column in self.columns.values():
            if len(column) == before:
                column.append(math.nan)

    def _rollout(self, place: int, row: dict[str, Any]) -> None:
        parts = [one["parts"].get("accuracy", one["reward"]) or 0.0 for one in row["completions"]]
        right = sum(part >= 1 for part in parts) / max(1, len(parts))
        self.shown.append(Shown(row["step"], place, row["problem"], row["prompt"], right))

    def _timing(self, place: int, row: dict[str, Any]) -> None:
        self.total = row.get("of")
        if row["seconds"] is not None:  # else it is the beginning
            self.timed.append((row["step"], row["seconds"]))

    @property
    def version(self) -> str:
        """Changes when anything was read."""
        return "-".join(f"{tail.offset:x}" for tail in self._tails.values())

    @property
    def done(self) -> int:
        """Steps that were taken and written down."""
        return max(self.timed[-1][0] if self.timed else -1, self.steps[-1] if self.steps else -1) + 1

    @property
    def pace(self) -> float | None:
        """Seconds a step, lately. The first row of a process holds its start as well, and is not counted."""
        rows = self.timed[-RECENT - 1 :]
        taken = rows[-1][0] - rows[0][0] if rows else 0
        return sum(seconds for _, seconds in rows[1:]) / taken if taken else None

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.timed)

    def column(self, name: str) -> np.ndarray:
        """The finite values of a metric, in order; empty where it was never measured."""
        values = np.array(self.columns.get(name, ()))
        return values[np.isfinite(values)]

    def curves(self, points: int) -> dict[str, Any]:
        """Steps and all columns with at most `points` values, and their running means: as JSON."""
        at = cuts(len(self.steps), points)
        thin = {name: means(np.array(values), at) for name, values in self.columns.items()}
        return {
            "of": self.total,
            "done": self.done,
            "steps": _plain(means(np.array(self.steps, float), at)),
            "columns": {name: _plain(values) for name, values in thin.items()},
            "means": {name: _plain(running_mean(values)) for name, values in thin.items()},
        }

    def responses(self, step: int) -> list[dict[str, Any]]:
        """The groups that were written down at a step, as `record.rollout_row` made them."""
        places = [one.place for one in self.shown if one.step == step]
        if not places:
            return []
        with open(self.folder / ROLLOUTS, "rb") as file:
            return [json.loads(file.readline()) for place in places if file.seek(place) == place]


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
