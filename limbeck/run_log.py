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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .files import atomic_write, sync
from .types import Group

METRICS, ROLLOUTS, ASKED, TIMING = "metrics.jsonl", "rollouts.jsonl", "asked.jsonl", "timing.jsonl"
BEAT = 5.0  # seconds after which a step is timed although its metrics are not logged
COUNTED = ("sampled_tokens", "learned_tokens", "labelled_tokens")  # metrics that count a step's tokens


class RunLog:
    """Writes the log of a stage. `RunLog(folder, step)` first drops the rows of step `step` and of later
    steps, so that a resumed stage can write them again.

    `total` is the number of steps, None if it is not known. The first row of the timing file has no seconds:
    it says that the stage is ready to begin with `step`."""

    def __init__(self, folder: Path, step: int = 0, total: int | None = None):
        self.folder = folder
        self.first = step
        self.total = total
        for name in (METRICS, ROLLOUTS, ASKED, TIMING):
            _keep(folder / name, lambda row: row["step"] < step)
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

    def drop_last(self, name: str, every: int) -> None:
        """Drop from the log `name` the rows that a shorter stage wrote at its last step only because it was
        the last: those of the step before the first one of this process, unless that step is a multiple of
        `every`, or no step is left."""
        last = self.first - 1
        if last % every and self.first != self.total:
            _keep(self.folder / name, lambda row: row["step"] != last)

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


def example(row: dict[str, Any], longest: int = 160) -> tuple[str, str]:
    """Return one response of a logged group, and the reason why it is not right ("" if there is none). It is
    the first response with the most frequent reason; in one of more than `longest` characters the middle is
    left out."""
    reasons = [completion["reasons"].get("accuracy", "") for completion in row["completions"]]
    (reason, _), *_ = Counter(reasons).most_common(1)
    text = " ".join(row["completions"][reasons.index(reason)]["text"].split())
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return text, reason


def quote(row: dict[str, Any]) -> str:
    """Return a sentence that quotes one response of a logged group."""
    text, reason = example(row)
    return f"One of the responses ({reason}): “{text}”" if reason else f"One of the responses: “{text}”"


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


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows of a JSONL file for which `wanted` returns False."""
    if not path.exists():
        return
    rows = [row for row in read(path) if wanted(row)]
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _tidy(value: Any) -> Any:
    """Return a float rounded to six significant digits, or None if it is not finite; return any other value
    unchanged."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
