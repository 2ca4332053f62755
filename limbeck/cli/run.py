"""The commands that carry out a recipe and show the state of its stages: run, status."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    RUNS,
    STATES,
    AsJson,
    Auto,
    Device,
    Home,
    RunFolder,
    find_recipe,
    load_recipe,
    open_run,
    print_rows,
)

if TYPE_CHECKING:
    from ..pipeline.graph import Node
    from ..pipeline.run import Run
    from .display import Lines

app = typer.Typer()

RecipeFile = Annotated[
    Path,
    typer.Argument(
        help="a recipe: a file, or the name of one that comes with Limbeck, such as quickstart",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str], typer.Option("--set", help="change a setting: stages.zero.steps=30", show_default=False)
]


@app.command()
def run(
    recipe: RecipeFile,
    runs: Home = RUNS,
    set_: Overrides = [],  # noqa: B006
    auto: Auto = False,
    as_json: AsJson = False,
    device: Device = "auto",
    right: Annotated[
        str | None,
        typer.Option(
            "--i-have-the-right",
            metavar="REASON",
            help="do what a teacher's terms forbid; recorded for ever",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Carry a recipe out; what is done already is not done again. Ctrl-C checkpoints and stops."""
    from ..pipeline.run import Run
    from .display import Events, Tree
    from .recipe_plan import cached_forecast

    display = _choose_display(as_json)
    path = find_recipe(recipe)
    try:
        job = Run(load_recipe(path, set_, auto), path.parent, runs, display, right, device)
        _stop_on_interrupt(job)
        page = job.execute(cached_forecast(job.graph))
    finally:
        _ignore_interrupts()
        if isinstance(display, Tree):
            display.close()
    if as_json:
        Events.emit("result", ok=True, report=str(page) if page else None)
    elif page:
        print(f"The report is at {page}")


def _choose_display(as_json: bool) -> Lines:
    """Return the display of a run: JSON events with `as_json`, a live table on a terminal, plain lines
    otherwise.
    """
    from .display import Events, Lines, Tree

    if as_json:
        return Events()
    if os.environ.get("TERM") == "dumb" or os.environ.get("CI") or not sys.stderr.isatty():
        return Lines()
    return Tree()


def _stop_on_interrupt(job: Run) -> None:
    """Install the handler of Ctrl-C (SIGINT) and SIGTERM: the first signal makes the run checkpoint and stop,
    the second ends it at once.

    A signal may arrive at any line of code, so the handler prints nothing and takes no lock.
    """

    def handle(number: int, frame: Any) -> None:
        if job.stopping:
            job.host.kill()
            if os.isatty(2):
                os.write(2, b"\x1b[?25h\n")  # show the cursor, which the tree hides
            os._exit(130)
        job.stop()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def _ignore_interrupts() -> None:
    """Ignore further interrupts once a run has ended, so that its exit code is not that of a signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)) and signal.getsignal(number) is not signal.default_int_handler:
            signal.signal(number, signal.SIG_IGN)


@app.command()
def status(run_folder: RunFolder, as_json: AsJson = False) -> None:
    """Where a run stands, and for whom it waits."""
    graph = open_run(run_folder)
    rows = [_status(node) for node in graph.nodes.values()]

    def line(row: dict[str, Any]) -> str:
        detail = row["artifact"] or ""
        if row["state"] == "asks":
            command = f"limbeck curate {run_folder} {row['stage']}"
            detail = f"{row['waiting_rows']} rows wait for a person: {command}"
        return f"{STATES[row['state']]:10} {row['stage']:32} {detail}"

    print_rows(rows, as_json, line)


def _status(node: Node) -> dict[str, Any]:
    """Return one stage's name, kind, state, artifact, seconds, and number of rows that wait for review."""
    from ..pipeline.review import review_queue

    artifact = node.artifact
    return {
        "stage": node.name,
        "kind": node.kind,
        "state": node.state,
        "artifact": artifact and artifact.folder.name,
        "seconds": artifact and artifact.manifest["seconds"],
        "waiting_rows": len(review_queue.pending(node.queue)) if node.state == "asks" else 0,
    }
