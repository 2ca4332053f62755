"""Append-only metrics and rollouts of a stage, and the readers that serve report and studio.

A stage folder holds `metrics.jsonl` (one line a step, the same bytes on every run), `rollouts.jsonl`
(a few groups now and then), `asked.jsonl` (which problems each step learned from) and `timing.jsonl` (seconds, which
never repeat and so stand apart).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .types import Group

METRICS, ROLLOUTS, ASKED, TIMING = "metrics.jsonl", "rollouts.jsonl", "asked.jsonl", "timing.jsonl"
PREPARING = "preparing.partial"  # what a stage does before its first step; swept away as torn files are
BEAT = 5.0  # seconds after which a step is timed although it is not logged
COUNTED = (
    "sampled_tokens",
    "learned_tokens",
    "labelled_tokens",
)  # metrics that say how many tokens a step had


class Record:
    """Writes a stage's history; `Record(folder, step)` forgets whatever came at or after `step`.

    `total` is how many steps there will be, where that is known. Timing begins with a row without seconds: the stage is
    ready for `step`.
    """

    def __init__(self, folder: Path, step: int = 0, total: int | None = None):
        self.folder, self.total = folder, total
        for name in (METRICS, ROLLOUTS, ASKED, TIMING):
            _keep_before(folder / name, step)
        (folder / PREPARING).unlink(missing_ok=True)
        _append(folder / TIMING, {"step": step - 1, "of": total, "seconds": None})
        self._began, self._tokens = time.monotonic(), 0

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        groups: Iterable[Group] = (),
        asked: Sequence[str] = (),
        tokens: int = 0,
    ) -> None:
        """Append one step: `metrics` as they are, `groups` as readable rows, `asked` the ids of all problems learned from;
        `tokens` where the metrics do not count them."""
        _append(self.folder / METRICS, {"step": step, **{k: _tidy(v) for k, v in metrics.items()}})
        for group in groups:
            _append(self.folder / ROLLOUTS, {"step": step, **rollout_row(group)})
        if asked:
            _append(self.folder / ASKED, {"step": step, "problems": list(asked)})
        self._time(step, tokens + sum(int(metrics.get(name, 0)) for name in COUNTED))

    def beat(self, step: int, tokens: int) -> None:
        """A step that is not logged: timed where it has been quiet for long, so that whoever watches sees it go on."""
        if time.monotonic() - self._began < BEAT:
            self._tokens += tokens
        else:
            self._time(step, tokens)

    def _time(self, step: int, tokens: int) -> None:
        now = time.monotonic()
        row = {
            "step": step,
            "of": self.total,
            "seconds": round(now - self._began, 3),
            "tokens": self._tokens + tokens,
        }
        _append(self.folder / TIMING, row)
        self._began, self._tokens = now, 0

    def sync(self) -> None:
        """Force to disk what was written, so that a checkpoint never outlives its history."""
        for name in (METRICS, ROLLOUTS, ASKED, TIMING):
            if (self.folder / name).exists():
                with open(self.folder / name, "rb") as file:
                    os.fsync(file.fileno())


def prepare(folder: Path, what: str) -> None:
    """Say what a stage does before its first step, for whoever watches; the record's beginning unsays it."""
    (folder / PREPARING).write_text(what, encoding="utf-8")


def rollout_row(group: Group) -> dict[str, Any]:
    """A group as people read it: problem, texts, rewards part by part, reasons."""
    return {
        "problem": group.problem.id,
        "prompt": group.problem.prompt,
        "language": group.problem.language,
        "completions": [
            {
                "text": completion.text,
                "length": len(completion.tokens),
                "stopped": completion.stopped,
                "reward": _tidy(reward),
                "parts": {k: _tidy(v) for k, v in score.parts.items()},
                "reasons": dict(score.reasons),
            }
            for completion, score, reward in zip(group.completions, group.scores, group.rewards, strict=True)
        ],
    }


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; a half-written last line (a kill) is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


class Tail:
    """Reads a JSONL file on from where reading stopped: `anew, lines = Tail(path).more()`.

    `anew` says that what was read before no longer holds: a stage that goes on from a checkpoint writes its history
    anew. Lines come with the place in the file where they begin; a half-written last one waits.
    """

    def __init__(self, path: Path):
        self.path, self.offset, self._inode = path, 0, 0

    def more(self) -> tuple[bool, list[tuple[int, bytes]]]:
        try:
            with open(self.path, "rb") as file:
                return self._read(file)
        except FileNotFoundError:
            return False, []

    def _read(self, file: BinaryIO) -> tuple[bool, list[tuple[int, bytes]]]:
        found = os.fstat(file.fileno())
        anew = self.offset > 0 and (found.st_ino != self._inode or found.st_size < self.offset)
        self._inode, self.offset = found.st_ino, 0 if anew else self.offset
        file.seek(self.offset)
        lines = []
        for line in file:
            if line.endswith(b"\n"):
                lines.append((self.offset, line))
                self.offset += len(line)
        return anew, lines


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """One dict a step, in order."""
    return list(read(folder / METRICS))


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _keep_before(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = [row for row in read(path) if row["step"] < step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def _tidy(value: Any) -> Any:
    """Six significant digits: enough for any curve, and short to read."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
