"""The status of a run: whether a process executes it, which stages have begun, and how it ended.

runs/NAME/.lock        a shared lock of every process that executes the run; freed when the process dies
runs/NAME/.pause       a request to write checkpoints and stop
runs/NAME/status.json  {"state", "sentence", "since", "begun": {STAGE: name of its partial folder}, "right",
                        "starts": {STAGE: Unix time}, "pid", "host", "started"}
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..types import Resumable
from .store import write

LOCK = ".lock"
PAUSE = ".pause"
STATUS = "status.json"
LOCK_ATTEMPTS = 3  # attempts to take a lock that another onlooker may hold for a few microseconds
LOCK_INTERVAL_SECONDS = 0.005  # seconds between two attempts


@dataclass(frozen=True)
class Status:
    """The content of `status.json`:
    `Status("paused", "stopped; the same command goes on", 1763822100.0, {"zero": "rl-3f…"})`.

    `state` is `running`, `pausing`, `paused`, `waits` (for reviews), `finished` or `failed`, and "" if no
    process has ever written the file. `sentence` is the reason for the state, `since` the Unix time of its
    beginning, `begun` maps stages that were started to the names of their partial folders, and `starts` to
    the Unix times of their starts. `right` is the claimed exemption from a licence's terms, if any. `pid` is
    the process that wrote the file, on the machine `host`, at work since the Unix time `started`.
    """

    state: str = ""
    sentence: str = ""
    since: float = 0.0
    begun: dict[str, str] = field(default_factory=dict)
    right: str | None = None
    starts: dict[str, float] = field(default_factory=dict)
    pid: int = 0
    host: str = ""
    started: float = 0.0


class RunStatus:
    """Context manager around the execution of a run. `with RunStatus(folder): ...` holds the run's lock and
    writes the status file at its beginning and end."""

    def __init__(self, folder: Path, right: str | None = None):
        """Prepare the status of the run in `folder`. `right` is the user's reason for a claim to be exempt
        from a licence's terms, if one was given."""
        self.folder = folder
        self.right = right
        self.state = ""
        self.begun: dict[str, str] = {}
        self.starts: dict[str, float] = {}
        self.started = time.time()
        self._lock: Any = None

    def __enter__(self) -> Self:
        self._lock = open(self.folder / LOCK, "ab")
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # shared: two processes may execute one run
        (self.folder / PAUSE).unlink(missing_ok=True)
        self.tell("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the disk may be full, which `error` then reports
            if error is None:
                self.tell("finished")
            else:
                ended = "paused" if isinstance(error, Resumable) else "failed"
                state = self.state if self.state in ("paused", "waits") else ended
                self.tell(state, str(error) or kind.__name__)
        self._lock.close()

    def tell(self, state: str, sentence: str = "") -> None:
        """Write `state` and its reason `sentence` to the status file."""
        self.state = state
        process = {"pid": os.getpid(), "host": os.uname().nodename, "started": self.started}
        status = Status(state, sentence, time.time(), self.begun, self.right, self.starts, **process)
        write(self.folder / STATUS, json.dumps(asdict(status), ensure_ascii=False) + "\n")

    def pause_requested(self) -> bool:
        """Return True if `request_pause` was called for this run since it began."""
        return (self.folder / PAUSE).exists()


def is_running(folder: Path) -> bool:
    """Return True while a process executes the run in `folder`, which is the case if its lock cannot be taken
    exclusively."""
    for _ in range(LOCK_ATTEMPTS):
        if _is_free(folder):
            return False
        time.sleep(LOCK_INTERVAL_SECONDS)
    return True


def _is_free(folder: Path) -> bool:
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
    """Read the status that the last process wrote; the default `Status()` if there is none."""
    try:
        values = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Status()
    known = {one.name for one in fields(Status)}
    return Status(**{name: value for name, value in values.items() if name in known})


def was_killed(folder: Path) -> bool:
    """Return True if the process that executed the run in `folder` ended without a word: its status says that
    it runs, and it does not hold the lock."""
    return status(folder).state in ("running", "pausing") and not is_running(folder)


def request_pause(folder: Path) -> None:
    """Ask the process that executes the run to write checkpoints and stop. A second call has no further
    effect, whereas a second Ctrl-C stops the run at once."""
    (folder / PAUSE).touch()
