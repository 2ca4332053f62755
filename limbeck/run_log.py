"""The run log of a stage: append-only metrics and rollouts, and the readers of report and studio.

A stage folder holds `metrics.jsonl` (one line per step, the same bytes on every run), `rollouts.jsonl` (a
group now and then), `asked.jsonl` (the problems that each step learned from) and `timing.jsonl` (seconds,
which differ from run to run and so have a file of their own)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .files import atomic_write
from .types import Group

METRICS, ROLLOUTS, ASKED, TIMING = "metrics.jsonl", "rollouts.jsonl", "asked.jsonl", "timing.jsonl"
PREPARING = "preparing.partial"  # a stage's work before its first step; the store sweeps it away
BEAT = 5.0  # seconds after which a step is timed although its metrics are not logged
COUNTED = ("sampled_tokens", "learned_tokens", "labelled_tokens")  # metrics that count a step's tokens


class RunLog:
    """Writes a stage's log; `RunLog(folder, step)` first drops the rows at and after `step`.

    `total` is the number of steps, if it is known. Timing begins with a row without seconds: the stage is
    ready for `step`."""

    def __init__(self, folder: Path, step: int = 0, total: int | None = None):
        self.folder = folder
        self.total = total
        for name in (METRICS, ROLLOUTS, ASKED, TIMING):
            _keep_before(folder / name, step)
        (folder / PREPARING).unlink(missing_ok=True)
        _append(folder / TIMING, {"step": step - 1, "of": total, "seconds": None})
        self._began = time.monotonic()
        self._tokens = 0

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        groups: Iterable[Group] = (),
        problems: Sequence[str] = (),
        tokens: int = 0,
    ) -> None:
        """Append one step: its metrics, groups as readable rows, and the ids of the problems that it learned
        from; `tokens` where the metrics do not count them."""
        values = {name: _tidy(value) for name, value in metrics.items()}
        _append(self.folder / METRICS, {"step": step, **values})
        for group in groups:
            _append(self.folder / ROLLOUTS, {"step": step, **rollout_row(group)})
        if problems:
            _append(self.folder / ASKED, {"step": step, "problems": list(problems)})
        counted = sum(int(metrics.get(name, 0)) for name in COUNTED)
        self._time(step, tokens + counted)

    def beat(self, step: int, tokens: int) -> None:
        """A step whose metrics are not logged: it is timed if the last timing is `BEAT` seconds ago, so that
        progress shows."""
        if time.monotonic() - self._began < BEAT:
            self._tokens += tokens
        else:
            self._time(step, tokens)

    def _time(self, step: int, tokens: int) -> None:
        """Append a row of timing: the seconds and tokens since the last one."""
        now = time.monotonic()
        seconds = round(now - self._began, 3)
        row = {"step": step, "of": self.total, "seconds": seconds, "tokens": self._tokens + tokens}
        _append(self.folder / TIMING, row)
        self._began = now
        self._tokens = 0

    def sync(self) -> None:
        """Force the log to disk, so that a checkpoint never outlives it."""
        for name in (METRICS, ROLLOUTS, ASKED, TIMING):
            if (self.folder / name).exists():
                with open(self.folder / name, "rb") as file:
                    os.fsync(file.fileno())


def prepare(folder: Path, work: str) -> None:
    """Tell what a stage does before its first step; the first step removes it."""
    (folder / PREPARING).write_text(work, encoding="utf-8")


def rollout_row(group: Group) -> dict[str, Any]:
    """A group in readable form: problem, texts, rewards part by part, reasons."""
    completions = []
    for completion, score, reward in zip(group.completions, group.scores, group.rewards, strict=True):
        row = {
            "text": completion.text,
            "length": len(completion.tokens),
            "stopped": completion.stopped,
            "reward": _tidy(reward),
            "parts": {name: _tidy(value) for name, value in score.parts.items()},
            "reasons": dict(score.reasons),
        }
        completions.append(row)
    return {
        "problem": group.problem.id,
        "prompt": group.problem.prompt,
        "language": group.problem.language,
        "completions": completions,
    }


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file; a half-written last line, left by a kill, is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


class Tail:
    """Reads a JSONL file on from the last place: `rewritten, lines = Tail(path).more()`.

    `rewritten` is True if earlier lines no longer hold: a stage that resumes from a checkpoint rewrites its
    log. Each line comes with its offset in the file; a half-written last line is left for the next call."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0
        self._inode = 0

    def more(self) -> tuple[bool, list[tuple[int, bytes]]]:
        """The lines since the last call; none if there is no file."""
        try:
            with open(self.path, "rb") as file:
                return self._read(file)
        except FileNotFoundError:
            return False, []

    def _read(self, file: BinaryIO) -> tuple[bool, list[tuple[int, bytes]]]:
        """The lines of an open file from the offset on."""
        status = os.fstat(file.fileno())
        rewritten = self.offset > 0 and (status.st_ino != self._inode or status.st_size < self.offset)
        self._inode = status.st_ino
        if rewritten:
            self.offset = 0
        file.seek(self.offset)
        lines = []
        for line in file:
            if line.endswith(b"\n"):
                lines.append((self.offset, line))
                self.offset += len(line)
        return rewritten, lines


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The metrics of all logged steps, in order."""
    return list(read(folder / METRICS))


def _append(path: Path, row: dict[str, Any]) -> None:
    """Append one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _keep_before(path: Path, step: int) -> None:
    """Drop the rows of a file at and after a step."""
    if not path.exists():
        return
    rows = [row for row in read(path) if row["step"] < step]
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _tidy(value: Any) -> Any:
    """A number to six significant digits, None if it is not finite; anything else as it is."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
