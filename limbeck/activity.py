"""The activity of a process: nested phases of work with counts, such as `sampling: 12 of 64 rows`. Loops
advance the counts; an `ActivityReport` writes them to a file, which displays read.

A count is an integer that is added to: it costs nothing beside a step of a model, and no result depends on
it. `limbeck.activity` needs no torch.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self, TypeVar

ACTIVITY = "activity.partial"  # in a stage's folder while it runs; the store sweeps it away
INTERVAL = 1.0  # seconds between two reports
RECORD_BYTES = 4096  # bytes of a report: one write, so that a reader does not see half of it

Item = TypeVar("Item")


@dataclass
class Phase:
    """A phase of work that goes on: `Phase("sampling", "rows", 64)`.

    `total` is the number of units to do, None if it is not known. `done` counts units and `tokens` the tokens
    processed, those of inner phases included. `began` and `changed` are the `time.monotonic()` of the
    beginning and of the last change of `done`. `inner` is the phase that goes on within this one.
    """

    name: str
    unit: str = ""
    total: int | None = None
    outer: Phase | None = None
    inner: Phase | None = None
    done: int = 0
    tokens: int = 0
    began: float = field(default_factory=lambda: time.monotonic())
    changed: float = field(default_factory=lambda: time.monotonic())
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def advance(self, count: int = 1) -> None:
        """Add `count` finished units. Safe to call from several threads."""
        with self.lock:
            self.done += count
            self.changed = time.monotonic()

    def add_tokens(self, count: int) -> None:
        """Add `count` tokens to this phase and to the phases around it."""
        part: Phase | None = self
        while part:
            part.tokens += count
            part = part.outer


_current: ContextVar[Phase | None] = ContextVar("phase", default=None)


@contextmanager
def phase(name: str, unit: str = "", total: int | None = None) -> Iterator[Phase]:
    """Open a phase inside the current one, and close it when the block ends. `total` is the number of
    units."""
    outer = _current.get()
    opened = Phase(name, unit, total, outer)
    if outer:
        outer.inner = opened
    _current.set(opened)
    try:
        yield opened
    finally:
        if outer and outer.inner is opened:
            outer.inner = None
        if _current.get() is opened:
            _current.set(outer)


def track(items: Sequence[Item], name: str, unit: str) -> Iterator[Item]:
    """Yield the items within a phase; an item counts as done when the next one is asked for.

    The phase is closed with the generator: whoever stops asking before the end closes it.
    """
    with phase(name, unit, len(items)) as opened:
        for item in items:
            yield item
            opened.advance()


def add_tokens(count: int) -> None:
    """Add `count` processed tokens to the current phase, if there is one."""
    current = _current.get()
    if current:
        current.add_tokens(count)


# ---------------------------------------------------------------- reports


@dataclass(frozen=True)
class PhaseReport:
    """A phase as a reader sees it: `PhaseReport("sampling", "rows", 12, 64, 4096, 3.5, 0.2)` began 3.5
    seconds ago, and its last row finished 0.2 seconds ago.

    `done` of `total` units are finished; `tokens` is the number of tokens processed.
    """

    name: str
    unit: str
    done: int
    total: int | None
    tokens: int
    seconds: float
    idle: float


class ActivityReport:
    """Context manager around the work of a stage: writes the phases opened inside to a file in `folder`, once
    every `INTERVAL` seconds, on a thread of its own. The file is removed at the end."""

    def __init__(self, folder: Path):
        self.path = folder / ACTIVITY
        self.root = Phase("")
        self._file = -1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="activity", daemon=True)

    def __enter__(self) -> Self:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        _current.set(self.root)
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        _current.set(None)
        os.close(self._file)
        self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            with suppress(OSError):  # the disk may be full, which the stage then reports
                self.write()

    def write(self) -> None:
        """Write the open phases to the file, in place."""
        phases = [asdict(part) for part in reports(self.root)]
        record = json.dumps({"at": time.time(), "phases": phases}, ensure_ascii=False).encode()
        if len(record) < RECORD_BYTES:
            os.pwrite(self._file, record.ljust(RECORD_BYTES), 0)


def reports(root: Phase) -> list[PhaseReport]:
    """Return the phases that are open inside `root`, the outermost first, as they are now."""
    now = time.monotonic()
    found = []
    part = root.inner
    while part:
        seconds = round(now - part.began, 3)
        idle = round(now - part.changed, 3)
        found.append(PhaseReport(part.name, part.unit, part.done, part.total, part.tokens, seconds, idle))
        part = part.inner
    return found


def read(folder: Path) -> list[PhaseReport]:
    """Return the phases of the process that works in `folder`, the outermost first; [] if there is no report.
    The time since the report was written is added to the seconds."""
    try:
        record = json.loads((folder / ACTIVITY).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    age = max(0.0, time.time() - record["at"])
    found = []
    for values in record["phases"]:
        seconds = values["seconds"] + age
        idle = values["idle"] + age
        found.append(PhaseReport(**{**values, "seconds": seconds, "idle": idle}))
    return found
