"""A run as a process of its own, which outlives the page that started it, and the server.

Who is at work is asked of the run's lock, not of a list that we keep: so a run that somebody started at a terminal is
seen, and paused, like any other; and after a restart nothing is forgotten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..config.load import dump, load, with_auto_curation
from ..pipeline import run_status
from ..pipeline.graph import resolve_paths
from ..pipeline.store import write
from ..types import LimbeckError

LOG, CHILD, START = "log.txt", ".child.json", ".start"
LAST_WORDS, ENDING = ("waits", "paused"), 10.0  # who has said these is gone within so many seconds
COMMAND = [sys.executable, "-c", "from limbeck.cli import main; main()", "run"]


@dataclass(frozen=True)
class State:
    """`State("failed", "stage zero: …", 1763822100.0)`: where a run stands, with the sentence that its command ended with.

    `name` is running, pausing, paused, waits (for people), finished, failed, or "" where nobody has said so far how it ended.
    """

    name: str
    sentence: str = ""
    since: float = 0.0

    @property
    def alive(self) -> bool:
        return self.name in ("running", "pausing")


def start(recipe: Path, runs: Path, overrides: list[str] | tuple[str, ...] = (), auto: bool = False) -> Path:
    """Carry a recipe out; returns the run's folder at once. A mistake in the recipe is told here; one that shows only
    later is told by `state`."""
    told = resolve_paths(load(recipe, overrides), recipe.parent)
    folder = runs.resolve() / told.name
    _begin(folder, dump(with_auto_curation(told) if auto else told), None)
    return folder


def resume(folder: Path) -> None:
    """Go on with a run that was paused, was killed, failed, or waited for people who have now reviewed."""
    if not (folder / "recipe.yaml").exists():
        raise LimbeckError(f"{folder} is no run: it has no recipe.yaml; start one from a recipe")
    if run_status.at_work(folder) and run_status.status(folder).state in LAST_WORDS:
        deadline = time.monotonic() + ENDING
        while (
            run_status.at_work(folder)
            and run_status.status(folder).state in LAST_WORDS
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        if run_status.at_work(folder):  # it has seen the reviews itself, and goes on
            return
    _begin(folder, None, run_status.status(folder).right or _child(folder).get("right"))


def pause(folder: Path) -> None:
    """Let the run checkpoint and stop, as Ctrl-C would. It takes as long as the step that is being taken."""
    if not run_status.at_work(folder):
        raise LimbeckError(f"{folder}: nobody is at work on it, so there is nothing to pause")
    run_status.ask_to_pause(folder)


def state(folder: Path) -> State:
    """Where a run stands, whoever started it."""
    working, told = run_status.at_work(folder), run_status.status(folder)
    if working and told.state not in LAST_WORDS:
        asked = told.state == "pausing" or (folder / run_status.PAUSE).exists()
        return State("pausing" if asked else "running", "", told.since)
    if told.state in ("running", "pausing"):
        return State(
            "failed",
            "its process ended without a word (killed, or the machine went down); it goes on from its last checkpoint",
            told.since,
        )
    if told.state:
        return State(told.state, told.sentence, told.since)
    return _newborn(folder)


def _newborn(folder: Path) -> State:
    """A process that was started and has not yet come to the run: on its way, or ended with its last line."""
    child = _child(folder)
    if not child:
        return State("finished" if (folder / "summary.json").exists() else "")
    if child["born"] and _born(child["pid"]) == child["born"]:
        return State("running", "", child["since"])
    return State("failed", _last_line(folder / LOG), child["since"])


def _child(folder: Path) -> dict[str, Any]:
    """The process that was started last from here."""
    try:
        return json.loads((folder / CHILD).read_text())
    except FileNotFoundError:
        return {}


def _begin(folder: Path, recipe: str | None, right: str | None) -> None:
    """Start the command on the recipe in a run's folder; `recipe` is put there first."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / START), open(folder / LOG, "ab") as log:
        if state(folder).alive:
            raise LimbeckError(
                f"{folder} is being carried out already; pause it first, or give the recipe another name"
            )
        if recipe:
            write(folder / "recipe.yaml", recipe)
        (folder / run_status.STATUS).unlink(missing_ok=True)
        claim = ["--i-have-the-right", right] if right else []
        child = subprocess.Popen(
            [*COMMAND, str(folder / "recipe.yaml"), "--runs", str(folder.parent), *claim],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "CI": "1"},
        )
        born = {"pid": child.pid, "born": _born(child.pid), "since": time.time(), "right": right}
        write(folder / CHILD, json.dumps(born))
    threading.Thread(target=child.wait, daemon=True).start()  # nobody is left a zombie


def _born(pid: int) -> str | None:
    """When a living process began, in the kernel's own count; a number that was used again began at another time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        return _listed(pid) if sys.platform != "linux" else None


def _listed(pid: int) -> str | None:
    """The same where there is no /proc."""
    shown = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip() or None


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("limbeck: ") if lines else "it ended without a word"
