"""The growing logs of a stage: columns of metrics, recorded groups of responses, and the pace.

Every call of `look` reads on from where the last one stopped, so following a long run costs only its new
lines.

Shapes: N values of a column.
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

RECENT = 10  # rows of timing that the pace is the mean of


@dataclass(frozen=True)
class Shown:
    """One recorded group of responses: `Shown(40, 18211, "clock/156-3", "use 6 1 5 make 3 ?", 0.25)`.

    `place` is the byte offset of its line in the file; `right` the share of its responses that are right.
    """

    step: int
    place: int
    problem: str
    prompt: str
    right: float


class History:
    """The logs in a stage's folder: `History(folder).look()`; empty where there are none. Thread-safe."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tails = {name: Tail(folder / name) for name in (METRICS, ROLLOUTS, TIMING)}
        self._lock = threading.Lock()
        self._reset(METRICS)
        self._reset(ROLLOUTS)
        self._reset(TIMING)

    def look(self) -> History:
        """Read the lines added since the last call; returns itself."""
        readers = {METRICS: self._add_metrics, ROLLOUTS: self._add_rollout, TIMING: self._add_timing}
        with self._lock:
            for name, add in readers.items():
                anew, lines = self._tails[name].more()
                if anew:
                    self._reset(name)
                for place, line in lines:
                    add(place, json.loads(line))
        return self

    def _reset(self, name: str) -> None:
        """Drop everything read from one log, which begins anew."""
        if name == METRICS:
            self.steps: list[int] = []
            self.columns: dict[str, list[float]] = {}
            self.alarms: list[tuple[int, str]] = []
            self.loads: list[list[float]] = []  # of experts at the latest step, layer by layer
            self.notes: list[dict[str, Any]] = []  # rows that contain a string
        elif name == ROLLOUTS:
            self.shown: list[Shown] = []
        else:
            self.timed: list[tuple[int, float]] = []
            self.total: int | None = None

    def _add_metrics(self, place: int, row: dict[str, Any]) -> None:
        """Add one step's metrics; a column has NaN where a step lacks it."""
        before = len(self.steps)
        step = row.pop("step")
        self.steps.append(step)
        self.alarms += [(step, str(alarm)) for alarm in row.pop("alarms", ())]
        self.loads = row.pop("expert_loads", self.loads)
        if any(isinstance(value, str) for value in row.values()):
            self.notes.append(row)
        for name, value in row.items():
            if value is None:
                value = math.nan
            if isinstance(value, int | float):
                column = self.columns.setdefault(name, [math.nan] * before)
                column.append(float(value))
        for column in self.columns.values():
            if len(column) == before:
                column.append(math.nan)

    def _add_rollout(self, place: int, row: dict[str, Any]) -> None:
        """Add one recorded group; a response is right if its accuracy (or else its reward) is at least 1."""
        completions = row["completions"]
        right = 0
        for completion in completions:
            accuracy = completion["parts"].get("accuracy", completion["reward"])
            right += (accuracy or 0.0) >= 1
        share = right / max(1, len(completions))
        self.shown.append(Shown(row["step"], place, row["problem"], row["prompt"], share))

    def _add_timing(self, place: int, row: dict[str, Any]) -> None:
        """Add one step's time; a row without seconds marks the start of a process."""
        self.total = row.get("of")
        if row["seconds"] is not None:
            self.timed.append((row["step"], row["seconds"]))

    @property
    def version(self) -> str:
        """A string that changes whenever anything was read."""
        return "-".join(f"{tail.offset:x}" for tail in self._tails.values())

    @property
    def done(self) -> int:
        """Number of steps that were taken and logged."""
        timed = self.timed[-1][0] if self.timed else -1
        measured = self.steps[-1] if self.steps else -1
        return max(timed, measured) + 1

    @property
    def pace(self) -> float | None:
        """Seconds a step over the latest rows; None without two of them.

        The first row of a process also contains its start and is not counted.
        """
        if not self.timed:
            return None
        first, *rows = self.timed[-RECENT - 1 :]
        steps = rows[-1][0] - first[0] if rows else 0
        if not steps:
            return None
        return sum(seconds for _, seconds in rows) / steps

    @property
    def seconds(self) -> float:
        """Seconds of all logged steps."""
        return sum(seconds for _, seconds in self.timed)

    def column(self, name: str) -> np.ndarray:
        """The finite values [N] of a metric in order; empty where it was never measured."""
        values = np.array(self.columns.get(name, ()))
        return values[np.isfinite(values)]

    def curves(self, points: int) -> dict[str, Any]:
        """Steps, all columns with at most `points` values, and their running means, as JSON."""
        at = cuts(len(self.steps), points)
        steps = means(np.array(self.steps, float), at)
        columns = {}
        smooth = {}
        for name, values in self.columns.items():
            column = means(np.array(values), at)
            columns[name] = _to_json(column)
            smooth[name] = _to_json(running_mean(column))
        return {
            "of": self.total,
            "done": self.done,
            "steps": _to_json(steps),
            "columns": columns,
            "means": smooth,
        }

    def responses(self, step: int) -> list[dict[str, Any]]:
        """The groups recorded at a step, as `run_log.rollout_row` made them."""
        places = [group.place for group in self.shown if group.step == step]
        if not places:
            return []
        groups = []
        with open(self.folder / ROLLOUTS, "rb") as file:
            for place in places:
                file.seek(place)
                groups.append(json.loads(file.readline()))
        return groups


def _to_json(values: np.ndarray) -> list[float | None]:
    """The `values` [N] to five digits, None for those that are not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
