"""The progress of a running stage, read from the files in its folder: steps, metrics, speed, time left, the
work within a step, and the latest rollout.

The reader may be the process that executes the run or any other on the same machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .. import activity
from ..activity import PhaseReport
from ..config.recipe import Stage
from ..run_log import METRICS, ROLLOUTS, TIMING

RECENT = 10  # rows of timing that the pace of a stage is taken from
TAIL_BYTES = 65536  # bytes at a file's end that are searched for its last lines
STEADY_SECONDS = 2.0  # seconds of a phase after which its own rate is told
UNSURE = 2.0  # times that a rate of one measurement may be wrong, in either direction
WRITING = ("sampling", "asking", "labelling")  # phases whose rate is that of their part of a stage
RATED_UNITS = ("rows", "problems", "tokens")  # of which a rate is told
CHUNKED_KINDS = ("sample", "screen", "pairs", "label", "evaluate")  # their steps are parts of the work


class Named(Protocol):
    """A stage with its name and settings: a node of the graph, or a stage as it is read from a run's
    folder."""

    name: str
    kind: str
    stage: Stage


@dataclass(frozen=True)
class Pace:
    """The recent speed of a stage: `Pace(4, 40, 12.0, 40960, 0.7)` took 12 seconds for 40 steps and 40,960
    tokens.

    `looks` is the number of timing records that it is computed from; the last record was written `since`
    seconds ago. `first` is the number of steps that were done when the process began.
    """

    looks: int
    steps: int
    seconds: float
    tokens: int
    since: float
    first: int = 0


@dataclass(frozen=True)
class TimeLeft:
    """The seconds that a stage still takes: `TimeLeft(40.0, 90.0)` says 40 to 90. With `at_most`, it may also
    be less than `low`."""

    low: float
    high: float
    at_most: bool = False


@dataclass(frozen=True)
class Rate:
    """A speed: `Rate(3400.0, "tokens a second")`."""

    value: float
    unit: str


@dataclass(frozen=True)
class Figures:
    """The progress of a stage at one moment, as numbers.

    `done` of `total` steps are finished; `total` is None before the first. `phases` is the work within the
    step, the outermost phase first. `spent` are the seconds since the stage started, `step_seconds` those
    since its last step. `metrics` are those of the last logged step.
    """

    done: int
    total: int | None
    phases: tuple[PhaseReport, ...]
    rate: Rate | None
    left: TimeLeft | None
    spent: float
    step_seconds: float
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """The progress of a running stage. `folder` has its log files; `began` is the `time.monotonic()` of its
    start; `foreseen` is the forecast of its `seconds`, `low` and `high`, None if there is none."""

    node: Named
    folder: Path
    began: float
    foreseen: Mapping[str, float] | None = None

    def figures(self) -> Figures:
        """Read the files, and return the progress as it is now."""
        done, total, metrics = self.look()
        pace = self.pace()
        phases = tuple(activity.read(self.folder))
        left = self._left(pace, done, total, phases) if total is not None else self._left_as_foreseen(1.0)
        return Figures(
            done, total, phases, rate(pace, phases), left, round(self.spent, 3), round(pace.since, 3), metrics
        )

    def look(self) -> tuple[int, int | None, dict[str, Any]]:
        """Return (steps done, total steps or None if unknown, latest metrics)."""
        timing = _last(self.folder / TIMING)
        metrics = _last(self.folder / METRICS)
        return timing.get("step", -1) + 1, timing.get("of"), metrics

    def pace(self) -> Pace:
        """Compute the speed from the latest timing records of the current process. The first record that a
        process writes has no seconds; records before it are left out, and so is the first step after it,
        which may be slower than the others, unless there is no other."""
        rows = _tail(self.folder / TIMING)
        first = 0
        for i in reversed(range(len(rows))):
            if rows[i]["seconds"] is None:
                first = rows[i]["step"] + 1
                rows = rows[i + 1 :]
                break
        rows = rows[-RECENT - 1 :]
        if len(rows) < 2:
            seconds = sum(row["seconds"] for row in rows)
            steps = sum(row["step"] + 1 - first for row in rows)
            tokens = sum(row.get("tokens", 0) for row in rows)
            return Pace(0, steps, seconds, tokens, self._silence(), first)
        timed = rows[1:]
        return Pace(
            looks=len(timed),
            steps=rows[-1]["step"] - rows[0]["step"],
            seconds=sum(row["seconds"] for row in timed),
            tokens=sum(row.get("tokens", 0) for row in timed),
            since=self._silence(),
            first=first,
        )

    def _silence(self) -> float:
        """Return the seconds since the last timing record was written, or since the stage started if there is
        none."""
        path = self.folder / TIMING
        if not path.exists():
            return self.spent
        age = time.time() - path.stat().st_mtime
        return min(self.spent, max(0.0, age))

    @property
    def spent(self) -> float:
        """The seconds since the stage started."""
        return time.monotonic() - self.began

    def thought(self) -> dict[str, Any]:
        """Return the latest logged rollout, {} if there is none."""
        return _last(self.folder / ROLLOUTS)

    # ------------------------------------------------------------ time left

    def _left(self, pace: Pace, done: int, total: int, phases: tuple[PhaseReport, ...]) -> TimeLeft | None:
        """Estimate the time left from the best that is known: the pace of the steps, the rate of the first
        part of a stage that works in parts, or the forecast."""
        if done >= total:
            return None
        if not pace.looks and phases and self.node.kind in CHUNKED_KINDS:
            outer = phases[0]
            if outer.name not in WRITING:
                return None
            if outer.done:
                return left_in_parts(outer, total - done)
        if pace.steps:
            return left_at_pace(pace, total - done, _may_end_early(self.node.stage))
        return self._left_as_foreseen(1 - pace.first / total)

    def _left_as_foreseen(self, share: float) -> TimeLeft | None:
        """Return what the forecast leaves of the time, None if there is no forecast or it is used up. `share`
        is the part of the stage that this process has to do, from 0 to 1."""
        if not self.foreseen:
            return None
        high = share * self.foreseen["high"] - self.spent
        low = share * self.foreseen["low"] - self.spent
        return TimeLeft(max(0.0, low), high) if high > 0 else None


def left_at_pace(pace: Pace, steps: int, at_most: bool = False) -> TimeLeft:
    """Return the time that `steps` more steps take at the measured rate.

    Time passes for the step that goes on, and for no step after it: however long it takes, the others are
    still to do, and the time left does not climb when it ends. The interval narrows with every measurement;
    after `RECENT` both ends are equal.
    """
    each = pace.seconds / pace.steps
    seconds = each * (steps - 1) + max(0.0, each - pace.since)
    factor = 1 + 1 / max(1, pace.looks) if pace.looks < RECENT else 1.0
    return TimeLeft(seconds / factor, seconds * factor, at_most)


def left_in_parts(counted: PhaseReport, parts: int) -> TimeLeft:
    """Return the time that the part in progress and those after it take, `parts` in all, at the rate at which
    the problems (or rows) of this part were finished up to the last one."""
    each = (counted.seconds - counted.idle) / counted.done
    rest = max(0.0, each * (counted.total - counted.done) - counted.idle)
    seconds = rest + each * counted.total * (parts - 1)
    return TimeLeft(seconds / UNSURE, seconds * UNSURE)


def rate(pace: Pace, phases: tuple[PhaseReport, ...]) -> Rate | None:
    """Return the speed: tokens a second of the phase that goes on, or of the last steps, or else units of the
    phase a second, or steps a minute; None if nothing is known."""
    steady = [one for one in phases if one.seconds >= STEADY_SECONDS]
    for one in reversed(steady):
        if one.tokens:
            return Rate(one.tokens / one.seconds, "tokens a second")
    if pace.tokens and pace.seconds:
        return Rate(pace.tokens / pace.seconds, "tokens a second")
    for one in reversed(steady):
        if one.done and one.unit in RATED_UNITS:
            return Rate(one.done / one.seconds, f"{one.unit} a second")
    if pace.steps and pace.seconds:
        return Rate(60 * pace.steps / pace.seconds, "steps a minute")
    return None


def _may_end_early(stage: Stage) -> bool:
    """Return True for an RL or distillation stage that has a budget of FLOPs, which may end it before its
    last step."""
    return stage.kind in ("rl", "distill") and bool(stage.flops or stage.flops_of)


# ---------------------------------------------------------------- files


def _last(path: Path) -> dict[str, Any]:
    """Return the last complete line of a JSONL file, {} if there is none."""
    rows = _tail(path, 1)
    return rows[0] if rows else {}


def _tail(path: Path, count: int = 4 * RECENT) -> list[dict[str, Any]]:
    """Return the last `count` complete lines of a JSONL file. There are fewer if the file has fewer in its
    last `TAIL_BYTES` bytes, and none if one of them is not valid JSON."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines[-count:]]
    except ValueError:
        return []
