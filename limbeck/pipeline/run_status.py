"""Whether somebody is at work on a run, what was begun, and how it ended: for pages and programs that look from outside.

runs/NAME/.lock        held, shared, by every process that carries the run out; the system frees it when one dies
runs/NAME/.pause       asks whoever is at work to checkpoint and stop
runs/NAME/status.json  {"state", "sentence", "since", "begun": {STAGE: partial folder}, "right"}
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .store import write

LOCK, PAUSE, STATUS = ".lock", ".pause", "status.json"


@dataclass(frozen=True)
class Status:
    """What was said last: `Status("paused", "stopped; the same command goes on from here", 1763822100.0, {"zero": "rl-3f…"})`.

    `state` is running, pausing, paused, waits (for people), finished, failed; "" where nobody has said anything.
    """

    state: str = ""
    sentence: str = ""
    since: float = 0.0
    begun: dict[str, str] = field(default_factory=dict)
    right: str | None = None


class RunStatus:
    """Held while a run is carried out: `with RunStatus(folder): ...` says that it runs, and in the end how it went."""

    def __init__(self, folder: Path, right: str | None = None):
        self.folder, self.right = folder, right
        self.state, self.begun = "", dict[str, str]()
        self._lock: Any = None

    def __enter__(self) -> Self:
        self._lock = open(self.folder / LOCK, "ab")
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # two may share a run, as they always could
        (self.folder / PAUSE).unlink(missing_ok=True)
        self.tell("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ends = "finished" if error is None else self.state if self.state in ("paused", "waits") else "failed"
        with suppress(OSError):  # the disk may be full, which is then what `error` says
            self.tell(ends, "" if error is None else str(error) or kind.__name__)
        self._lock.close()

    def tell(self, state: str, sentence: str = "") -> None:
        self.state = state
        told = {
            "state": state,
            "sentence": sentence,
            "since": time.time(),
            "begun": self.begun,
            "right": self.right,
        }
        write(self.folder / STATUS, json.dumps(told, ensure_ascii=False) + "\n")

    def asked_to_pause(self) -> bool:
        return (self.folder / PAUSE).exists()


def at_work(folder: Path) -> bool:
    """Whether a process carries this run out now: its lock cannot be had alone."""
    for _ in range(3):  # somebody else who looks holds it for a few microseconds
        if _free(folder):
            return False
        time.sleep(0.005)
    return True


def _free(folder: Path) -> bool:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def status(folder: Path) -> Status:
    """What whoever was at work last has said."""
    try:
        return Status(**json.loads((folder / STATUS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Status()


def ask_to_pause(folder: Path) -> None:
    """Asked twice is asked once: a second Ctrl-C would stop at once, this never does."""
    (folder / PAUSE).touch()
