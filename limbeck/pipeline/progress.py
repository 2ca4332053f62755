"""The progress of a running stage, read from its files: steps, metrics, pace, the latest rollout."""

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

    `looks` counts the rows of timing behind it; the last one is `since` seconds old.
    """

    looks: int
    steps: int
    seconds: float
    tokens: int
    since: float


@dataclass(frozen=True)
class Progress:
    """A running stage; `began` is the monotonic time of its start."""

    node: Node
    folder: Path
    began: float

    def look(self) -> tuple[int, int | None, dict[str, Any]]:
        """Steps done, steps in all, and the latest metrics."""
        timing = _last(self.folder / TIMING)
        metrics = _last(self.folder / METRICS)
        return timing.get("step", -1) + 1, timing.get("of"), metrics

    def pace(self) -> Pace:
        """The pace over the latest rows of timing; a process begins with a row that has no seconds."""
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
        """Seconds since the last row of timing was written."""
        path = self.folder / TIMING
        if not path.exists():
            return self.spent
        age = time.time() - path.stat().st_mtime
        return min(self.spent, max(0.0, age))

    @property
    def spent(self) -> float:
        """Seconds since the stage started."""
        return time.monotonic() - self.began

    def preparing(self) -> str:
        """The stage's sentence on its preparations, "" if it wrote none or has begun its steps."""
        with suppress(FileNotFoundError):
            return (self.folder / PREPARING).read_text(encoding="utf-8")
        return ""

    def thought(self) -> dict[str, Any]:
        """The latest rollout, {} if there is none."""
        return _last(self.folder / ROLLOUTS)


def _last(path: Path) -> dict[str, Any]:
    """The last whole line of a JSONL file, {} if there is none."""
    rows = _tail(path, 1)
    return rows[0] if rows else {}


def _tail(path: Path, count: int = 4 * RECENT) -> list[dict[str, Any]]:
    """The last `count` whole lines of a JSONL file, or fewer; reads no more than `TAIL_BYTES`."""
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
