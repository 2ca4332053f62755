"""The logs of a stage while they grow: metrics as columns, recorded groups of responses, and the pace
(seconds a step).

Every call of `History.look` reads only the lines written since the last call, so following a long run stays
cheap.

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
    """One recorded group of responses to one problem.

    `Shown(40, 18211, "clock/156-3", "use 6 1 5 make 3 ?", 0.25)` was recorded at step 40. `place` is the byte
    offset of the group's line in the log file; `right` is the share of its responses that are right, from 0
    to 1.
    """

    step: int
    place: int
    problem: str
    prompt: str
    right: float


class History:
    """The logs in a stage's folder: `History(folder).look()` reads them.

    A missing log counts as empty. Threads may share a History.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._tails = {name: Tail(folder / name) for name in (METRICS, ROLLOUTS, TIMING)}
        self._lock = threading.Lock()
        self._reset(METRICS)
        self._reset(ROLLOUTS)
        self._reset(TIMING)

    def look(self) -> History:
        """Read the lines that were added to the logs since the last call, and return self."""
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
        """Forget everything read from the log `name`, because its file was begun anew."""
        if name == METRICS:
            self.steps: list[int] = []
            self.columns: dict[str, list[float]] = {}
            self.alarms: list[tuple[int, str]] = []
            self.loads: list[list[float]] = []  # [layer][expert] share of tokens, latest step
            self.notes: list[dict[str, Any]] = []  # metrics rows that contain a string
        elif name == ROLLOUTS:
            self.shown: list[Shown] = []
        else:
            self.timed: list[tuple[int, float]] = []
            self.total: int | None = None

    def _add_metrics(self, place: int, row: dict[str, Any]) -> None:
        """Add the metrics of one step.

        A column gets NaN for a step without that metric; `place`, the line's byte offset, is not used.
        """
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
        """Add one recorded group of responses, whose line begins at the byte offset `place`.

        A response is right if its accuracy (its reward if it has no accuracy) is at least 1.
        """
        completions = row["completions"]
        right = 0
        for completion in completions:
            accuracy = completion["parts"].get("accuracy", completion["reward"])
            right += (accuracy or 0.0) >= 1
        share = right / max(1, len(completions))
        self.shown.append(Shown(row["step"], place, row["problem"], row["prompt"], share))

    def _add_timing(self, place: int, row: dict[str, Any]) -> None:
        """Add the time of one step.

        A row without seconds only marks the start of a process, with the total number of steps; `place`, the
        line's byte offset, is not used.
        """
        self.total = row.get("of")
        if row["seconds"] is not None:
            self.timed.append((row["step"], row["seconds"]))

    @property
    def version(self) -> str:
        """A string that changes whenever new lines have been read, for comparison with an earlier one."""
        return "-".join(f"{tail.offset:x}" for tail in self._tails.values())

    @property
    def done(self) -> int:
        """The number of steps that the logs contain: one more than the latest logged step."""
        timed = self.timed[-1][0] if self.timed else -1
        measured = self.steps[-1] if self.steps else -1
        return max(timed, measured) + 1

    @property
    def pace(self) -> float | None:
        """The mean seconds a step over the latest logged steps, or None with fewer than two rows of
        timing.

        The oldest of these rows is not counted, as it may contain the start of a process.
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
        """The sum of the seconds of all logged steps."""
        return sum(seconds for _, seconds in self.timed)

    def column(self, name: str) -> np.ndarray:
        """Return the finite values [N] of the metric `name` in the order of the steps; an empty array if
        it was never measured.
        """
        values = np.array(self.columns.get(name, ()))
        return values[np.isfinite(values)]

    def curves(self, points: int) -> dict[str, Any]:
        """Return the steps, all metrics and their running means as JSON data, each shortened to at most
        `points` values.
        """
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
        """Return the groups of responses recorded at a step, read from the log as `run_log.rollout_row`
        wrote them.
        """
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
    """Return the `values` [N] as a list of floats with five significant digits, None for those that are
    not finite.
    """
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
