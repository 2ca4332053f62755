"""The progress of a running stage, read from the log files in its folder: steps, metrics, speed, and the
latest rollout."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run_log import METRICS, PREPARING, ROLLOUTS, TIMING
from .graph import Node

RECENT = 10  # rows of timing that the pace of a stage is taken from
TAIL_BYTES = 65536  # bytes at a file's end that are searched for its last lines


@dataclass(frozen=True)
class Pace:
    """The recent speed of a stage: `Pace(4, 40, 12.0, 40960, 0.7)` took 12 seconds for 40 steps and 40,960
    tokens.

    `looks` is the number of timing records that it is computed from; the last record was written `since`
    seconds ago.
    """

    looks: int
    steps: int
    seconds: float
    tokens: int
    since: float


@dataclass(frozen=True)
class Progress:
    """The progress of a running stage. `folder` has its log files; `began` is the `time.monotonic()` of its
    start."""

    node: Node
    folder: Path
    began: float

    def look(self) -> tuple[int, int | None, dict[str, Any]]:
        """Return (steps done, total steps or None if unknown, latest metrics)."""
        timing = _last(self.folder / TIMING)
        metrics = _last(self.folder / METRICS)
        return timing.get("step", -1) + 1, timing.get("of"), metrics

    def pace(self) -> Pace:
        """Compute the speed from the latest timing records of the current process. The first record that a
        process writes has no seconds; records before it are left out."""
        rows = _tail(self.folder / TIMING)
        for i in reversed(range(len(rows))):
            if rows[i]["seconds"] is None:
                rows = rows[i + 1 :]
                break
        rows = rows[-RECENT - 1 :]
        if len(rows) < 2:
            return Pace(0, 0, 0.0, 0, self._silence())
        timed = rows[1:]
        return Pace(
            looks=len(timed),
            steps=rows[-1]["step"] - rows[0]["step"],
            seconds=sum(row["seconds"] for row in timed),
            tokens=sum(row.get("tokens", 0) for row in timed),
            since=self._silence(),
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

    def preparing(self) -> str:
        """Return the sentence that describes what the stage does before its first step, "" if there is
        none."""
        with suppress(FileNotFoundError):
            return (self.folder / PREPARING).read_text(encoding="utf-8")
        return ""

    def thought(self) -> dict[str, Any]:
        """Return the latest logged rollout, {} if there is none."""
        return _last(self.folder / ROLLOUTS)


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
