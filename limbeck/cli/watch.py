"""The command `limbeck watch`, which follows a run from outside, and the figures of a run at work that
`limbeck status` shows."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .options import AsJson, RunFolder, usage_error

if TYPE_CHECKING:
    from ..pipeline.run_state import RunState, StageState
    from .display import Lines

app = typer.Typer()

LOOK_SECONDS = 0.5  # seconds between two looks at a run
RESUMABLE = 75  # exit code: the run was stopped, was killed, or waits for a person
FAILED = 2  # exit code: the run has failed
ENDS = {"finished": 0, "paused": RESUMABLE, "waits": RESUMABLE, "killed": RESUMABLE, "failed": FAILED}


@app.command()
def watch(run_folder: RunFolder, as_json: AsJson = False) -> None:
    """Follow a run until it ends, also one that has not begun yet. Ctrl-C ends the watching, not the run."""
    follow(run_folder, as_json)


def follow(folder: Path, as_json: bool = False) -> None:
    """Show the progress of the run in `folder` until it ends; the exit code tells how."""
    from .display import Events, Tree

    display = choose_display(as_json, sys.stdout)
    display.told_by_stages = ()  # what stages tell is heard by the process that carries them out
    try:
        state = _Watch(folder, display).follow()
    except KeyboardInterrupt:
        display.say("watches no more; the run goes on")
        raise typer.Exit from None
    finally:
        if isinstance(display, Tree):
            display.close()
    if as_json:
        Events.emit("result", ok=ENDS[state] == 0, state=state)
    raise typer.Exit(ENDS[state])


def choose_display(as_json: bool, stream: Any) -> Lines:
    """Return the display of a run: JSON events with `as_json`, a live table if `stream` is a terminal, plain
    lines otherwise."""
    from .display import Events, Lines, Tree

    if as_json:
        return Events()
    if os.environ.get("TERM") == "dumb" or os.environ.get("CI") or not stream.isatty():
        return Lines(stream)
    return Tree(stream)


# ---------------------------------------------------------------- the state of a run


@dataclass(frozen=True)
class Carrier:
    """How a run stands and who carries it out: `Carrier(True, "running", "", 1423, "atlas", ...)`.

    `alive` is True while a process executes the run. `state` is that of `run_status.Status`, or `killed` if
    the process ended without a word, or "" before the first. `sentence` is the reason, `pid` the last
    process, on the machine `host`, at work since the Unix time `started`; `since` is when the state began;
    `begun` maps the stages that it had begun to their folders.
    """

    alive: bool
    state: str
    sentence: str
    pid: int
    host: str
    started: float
    since: float
    begun: dict[str, str]

    def __str__(self) -> str:
        """The state as a sentence for people."""
        from .display import span

        who = f"process {self.pid} on {self.host}" if self.pid else "a process"
        if self.state in ("running", "pausing"):
            now = "is stopping" if self.state == "pausing" else "carries it out"
            spent = span(max(0.0, time.time() - self.started))
            return f"{who} {now}, since {_moment(self.started)} ({spent})"
        if self.state == "killed":
            return f"{who} was killed; run again to go on"
        if not self.state:
            return "nobody has carried it out yet"
        reason = f": {self.sentence}" if self.sentence else ""
        return f"{self.state} at {_moment(self.since)}{reason}"


def carrier(folder: Path) -> Carrier:
    """Return how the run in `folder` stands and who carries it out."""
    from ..pipeline import run_status

    status = run_status.status(folder)
    alive = run_status.is_running(folder)
    state = status.state
    if not alive and run_status.was_killed(folder):
        state = "killed"
    process = (status.pid, status.host, status.started, status.since, status.begun)
    return Carrier(alive, state, status.sentence, *process)


def _moment(seconds: float) -> str:
    """Return a Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


# ---------------------------------------------------------------- watching


@dataclass(frozen=True)
class _Shown:
    """The stages of a run in the form that displays take, as they take a graph."""

    nodes: dict[str, _ShownStage]


@dataclass(frozen=True)
class _ShownStage:
    """A stage in the form that displays take, as they take a node of a graph."""

    name: str
    kind: str
    state: str
    artifact: Any


class _Watch:
    """Looks at a run again and again, and shows it."""

    def __init__(self, folder: Path, display: Lines):
        self.folder = folder
        self.display = display
        self.done: set[str] | None = None

    def follow(self) -> str:
        """Show the run until it ends, and return its last state."""
        self._await_recipe()
        waited = False
        while True:
            before = carrier(self.folder)
            self._show()
            if before.state in ENDS and not before.alive:
                self.display.say(f"{self.folder}: {before}")
                return before.state
            if not before.state and not waited:
                waited = True
                self.display.say(f"{self.folder}: {before}; waits for `limbeck run`")
            time.sleep(LOOK_SECONDS)

    def _await_recipe(self) -> None:
        """Wait until the run has a folder with a recipe."""
        if self.folder.exists() and not self.folder.is_dir():
            raise usage_error(
                f"{self.folder} is a file and no run; give a run's folder, such as runs/quickstart"
            )
        if (self.folder / "recipe.yaml").exists():
            return
        self.display.say(f"{self.folder}: has not begun; waits for `limbeck run`")
        while not (self.folder / "recipe.yaml").exists():
            time.sleep(LOOK_SECONDS)

    def _show(self) -> None:
        """Show the stages as they are now, and those that have ended since the last look."""
        from ..pipeline.run_state import look
        from ..pipeline.run_view import at_work

        run = look(self.folder)
        shown = shown_stages(run)
        done = {name for name, stage in shown.nodes.items() if stage.artifact}
        for name in shown.nodes:
            if self.done is not None and name in done - self.done:
                self.display.finished(shown.nodes[name], shown.nodes[name].artifact)
        self.done = done
        self.display.show(shown, at_work(run))


def shown_stages(run: RunState) -> _Shown:
    """Return the stages of a run in the form that displays take."""
    return _Shown({stage.name: _shown_stage(stage) for stage in run.stages if stage.kind != "report"})


def _shown_stage(stage: StageState) -> _ShownStage:
    from ..pipeline.store import Artifact

    artifact = Artifact(stage.folder, stage.manifest) if stage.state == "done" else None
    return _ShownStage(stage.name, stage.kind, stage.state, artifact)


def live_figures(folder: Path) -> dict[str, Any]:
    """Return the figures of each stage that the process of the run in `folder` works on, by name."""
    from ..pipeline.run_state import look
    from ..pipeline.run_view import at_work

    return {name: progress.figures() for name, progress in at_work(look(folder)).items()}


def carrier_as_json(shown: Carrier) -> dict[str, Any]:
    """Return the state of a run, and who carries it out, as JSON data."""
    return {**asdict(shown), "told": str(shown)}
