"""Start, resume and pause runs, each a process of its own that outlives the page and the server.

A run's state is read from its lock and its status file, not from a list in this process. So a run that was
started at a terminal is shown and paused like any other, and a restarted server knows all runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..config.load import dump, load, with_auto_curation
from ..pipeline import run_status
from ..pipeline.graph import resolve_paths
from ..pipeline.store import write
from ..types import LimbeckError

LOG = "log.txt"
CHILD = ".child.json"
START_LOCK = ".start"
FINAL_STATES = ("waits", "paused")  # a process that has written one of these is about to end
EXIT_TIMEOUT_SECONDS = 10.0  # seconds that a process in a final state is given to end
POLL_SECONDS = 0.05  # seconds between two looks at the state of an ending process
COMMAND = [sys.executable, "-c", "from limbeck.cli import main; main()", "run"]


@dataclass(frozen=True)
class State:
    """The state of a run, a sentence about it, and the time since when it holds.

    `State("failed", "stage zero: …", 1763822100.0)`. `name` is "running", "pausing", "paused", "waits" (for
    reviews by people), "finished", "failed", or "" if no command has recorded a state. `sentence` is the last
    message of the run's command. `since` is the Unix time of the last change.
    """

    name: str
    sentence: str = ""
    since: float = 0.0

    @property
    def alive(self) -> bool:
        """True while the run's process works: its state is "running" or "pausing"."""
        return self.name in ("running", "pausing")


def start(recipe: Path, runs: Path, overrides: Sequence[str] = (), auto: bool = False) -> Path:
    """Start a run of a recipe in a new process, and return the run's folder at once.

    `runs` is the folder of runs. Each of `overrides` is `key.path=value` and replaces a setting of the
    recipe. With `auto`, the policy of each curate stage decides in place of people.

    Raises LimbeckError for a mistake in the recipe, or if the run is being carried out already. Failures
    after the start are reported by `state`.
    """
    settings = resolve_paths(load(recipe, list(overrides)), recipe.parent)
    if auto:
        settings = with_auto_curation(settings)
    folder = runs.resolve() / settings.name
    _start_process(folder, dump(settings))
    return folder


def resume(folder: Path) -> None:
    """Resume a run that was paused or killed, has failed, or waits for reviews.

    Raises LimbeckError if `folder` has no recipe, or if the run is being carried out already.
    """
    if not (folder / "recipe.yaml").exists():
        raise LimbeckError(f"{folder} is no run: it has no recipe.yaml; start one from a recipe")
    if _is_ending(folder):
        _wait_for_exit(folder)
        if run_status.is_running(folder):  # the process has seen the reviews and continues
            return
    right = run_status.status(folder).right or _child(folder).get("right")
    _start_process(folder, right=right)


def pause(folder: Path) -> None:
    """Ask a run to write a checkpoint after its current step and then to stop.

    Returns at once. Raises LimbeckError if no process is carrying out the run.
    """
    if not run_status.is_running(folder):
        raise LimbeckError(f"{folder}: nobody is at work on it, so there is nothing to pause")
    run_status.request_pause(folder)


def state(folder: Path) -> State:
    """Return the state of the run in `folder`, whether it was started here or at a terminal."""
    is_running = run_status.is_running(folder)
    status = run_status.status(folder)
    if is_running and status.state not in FINAL_STATES:
        pausing = status.state == "pausing" or (folder / run_status.PAUSE).exists()
        return State("pausing" if pausing else "running", "", status.since)
    if status.state in ("running", "pausing"):
        return State(
            "failed",
            "its process ended without a word (killed, or the machine went down); "
            "it goes on from its last checkpoint",
            status.since,
        )
    if status.state:
        return State(status.state, status.sentence, status.since)
    return _state_of_child(folder)


def _state_of_child(folder: Path) -> State:
    """Return the state of a run that has no status file yet, judged by its process.

    The process is starting, or has failed before it could write a status.
    """
    child = _child(folder)
    if not child:
        return State("finished" if (folder / "summary.json").exists() else "")
    if child["born"] and _start_time(child["pid"]) == child["born"]:
        return State("running", "", child["since"])
    return State("failed", _last_line(folder / LOG), child["since"])


def _child(folder: Path) -> dict[str, Any]:
    """Return the record of the last process that this module started for a run; empty without one."""
    try:
        return json.loads((folder / CHILD).read_text())
    except FileNotFoundError:
        return {}


def _is_ending(folder: Path) -> bool:
    """True if the run's process has written a final state and is about to end."""
    return run_status.is_running(folder) and run_status.status(folder).state in FINAL_STATES


def _wait_for_exit(folder: Path) -> None:
    """Wait until an ending process has ended or continues, for `EXIT_TIMEOUT_SECONDS` at most."""
    deadline = time.monotonic() + EXIT_TIMEOUT_SECONDS
    while _is_ending(folder) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _start_process(folder: Path, recipe: str | None = None, right: str | None = None) -> None:
    """Start `limbeck run` on the recipe in a run's folder.

    `recipe` is the text of a recipe to store there first; None keeps the old one. `right` is the reason for
    which a licence's terms may be set aside, passed on as `--i-have-the-right`.

    Raises LimbeckError if the run is being carried out already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / START_LOCK):
        if state(folder).alive:
            raise LimbeckError(
                f"{folder} is being carried out already; pause it first, or give the recipe another name"
            )
        if recipe:
            write(folder / "recipe.yaml", recipe)
        (folder / run_status.STATUS).unlink(missing_ok=True)
        child = _spawn(folder, right)
        record = {
            "pid": child.pid,
            "born": _start_time(child.pid),
            "since": time.time(),
            "right": right,
        }
        write(folder / CHILD, json.dumps(record))
    threading.Thread(
        target=child.wait, daemon=True
    ).start()  # reaps the process, so it does not stay a zombie


def _spawn(folder: Path, right: str | None) -> subprocess.Popen:
    """Start `limbeck run` on the recipe in a run's folder, and return its process.

    The process has a session of its own, so it outlives this one; its output is appended to the run's log.
    """
    command = [*COMMAND, str(folder / "recipe.yaml"), "--runs", str(folder.parent)]
    if right:
        command += ["--i-have-the-right", right]
    with open(folder / LOG, "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "CI": "1"},
        )


def _start_time(pid: int) -> str | None:
    """Return the start time of a living process, None if there is none with this id.

    The unit is the system's (clock ticks on Linux). A later process with the same id has another start time,
    so the two can be told apart.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return _start_time_by_ps(pid) if sys.platform != "linux" else None
    fields = stat.rpartition(")")[2].split()  # the command's name, in parentheses, may contain spaces
    is_dead = fields[0] in "ZX"
    return None if is_dead else fields[19]


def _start_time_by_ps(pid: int) -> str | None:
    """Return the start time of a process as `ps` prints it, on systems without /proc; None if it is dead."""
    listing = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return listing.stdout.strip() or None


def _last_line(path: Path) -> str:
    """Return the last line of a log file, without the program's name at its beginning."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("limbeck: ") if lines else "it ended without a word"
