"""The run log of a stage: append-only files of metrics and rollouts, and the functions that read them for
the report and the web interface.

A stage folder holds `metrics.jsonl` (one line for each logged step, the same bytes on every run),
`rollouts.jsonl` (some groups of completions), `asked.jsonl` (the ids of the problems that each step learned
from) and `timing.jsonl` (seconds; they differ from run to run and so have a file of their own)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .files import atomic_write, sync
from .types import Group

METRICS, ROLLOUTS, ASKED, TIMING = "metrics.jsonl", "rollouts.jsonl", "asked.jsonl", "timing.jsonl"
PREPARING = "preparing.partial"  # a stage's work before its first step; the store sweeps it away
BEAT = 5.0  # seconds after which a step is timed although its metrics are not logged
COUNTED = ("sampled_tokens", "learned_tokens", "labelled_tokens")  # metrics that count a step's tokens


class RunLog:
    """Writes the log of a stage. `RunLog(folder, step)` first drops the rows of step `step` and of later
    steps, so that a resumed stage can write them again.

    `total` is the number of steps, None if it is not known. The first row of the timing file has no seconds:
    it says that the stage is ready to begin with `step`."""

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
        weights: str = "",
    ) -> None:
        """Append one step: its metrics, `groups` as readable rows, and the ids `problems` of the problems
        that it learned from. `tokens` is the number of tokens processed that the metrics do not count.
        `weights` is the checksum of the weights that sampled; it goes with the seconds, since it is no part
        of what a run results in."""
        values = {name: _tidy(value) for name, value in metrics.items()}
        _append(self.folder / METRICS, {"step": step, **values})
        for group in groups:
            _append(self.folder / ROLLOUTS, {"step": step, **rollout_row(group)})
        if problems:
            _append(self.folder / ASKED, {"step": step, "problems": list(problems)})
        counted = sum(int(metrics.get(name, 0)) for name in COUNTED)
        self._time(step, tokens + counted, weights)

    def beat(self, step: int, tokens: int) -> None:
        """Record progress at a step whose metrics are not logged: append a timing row if the last one is at
        least `BEAT` seconds old, otherwise only count the `tokens`."""
        if time.monotonic() - self._began < BEAT:
            self._tokens += tokens
        else:
            self._time(step, tokens)

    def _time(self, step: int, tokens: int, weights: str = "") -> None:
        """Append a timing row: the seconds and the tokens since the last timing row, and a checksum of the
        weights if there is one."""
        now = time.monotonic()
        seconds = round(now - self._began, 3)
        row = {"step": step, "of": self.total, "seconds": seconds, "tokens": self._tokens + tokens}
        _append(self.folder / TIMING, {**row, "weights": weights} if weights else row)
        self._began = now
        self._tokens = 0

    def sync(self) -> None:
        """Force the log to disk. Called before a checkpoint is saved, so that the log has every step that
        the checkpoint has."""
        for name in (METRICS, ROLLOUTS, ASKED, TIMING):
            if (self.folder / name).exists():
                sync(self.folder / name)


def prepare(folder: Path, work: str) -> None:
    """Write down what a stage does before its first step, such as loading data, for display. The note is
    deleted when the stage opens its run log."""
    (folder / PREPARING).write_text(work, encoding="utf-8")


def rollout_row(group: Group) -> dict[str, Any]:
    """Return a group in a form that people can read: the problem, and the text, length in tokens, reward,
    reward parts and reasons of each completion."""
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
    """Yield the rows of a JSONL file; none if there is no file. An incomplete last line, left by a killed
    process, is skipped."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


class Tail:
    """Reads the lines of a JSONL file that were added since the last call: `rewritten, lines =
    Tail(path).more()`.

    `rewritten` is True if the file was replaced and the lines returned earlier are no longer valid; reading
    then starts again at the beginning. This happens when a stage resumes from a checkpoint. Each line comes
    with its offset in the file, in bytes. An incomplete last line is left for the next call."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0
        self._inode = 0

    def more(self) -> tuple[bool, list[tuple[int, bytes]]]:
        """Return whether the file was rewritten, and the lines added since the last call with their offsets
        in bytes; no lines if there is no file."""
        try:
            with open(self.path, "rb") as file:
                return self._read(file)
        except FileNotFoundError:
            return False, []

    def _read(self, file: BinaryIO) -> tuple[bool, list[tuple[int, bytes]]]:
        """Read the complete lines of an open file from the current offset on; see `more` for the result."""
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
    """Return the metrics of all logged steps of the stage in `folder`, in order."""
    return list(read(folder / METRICS))


def _append(path: Path, row: dict[str, Any]) -> None:
    """Append a row as one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _keep_before(path: Path, step: int) -> None:
    """Drop the rows of a JSONL file that belong to step `step` or a later step."""
    if not path.exists():
        return
    rows = [row for row in read(path) if row["step"] < step]
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _tidy(value: Any) -> Any:
    """Return a float rounded to six significant digits, or None if it is not finite; return any other value
    unchanged."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
