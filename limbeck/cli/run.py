"""The commands that carry out a recipe and show the state of its stages: run, status."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from .options import (
    RUNS,
    STATES,
    AsJson,
    Auto,
    Home,
    RunFolder,
    find_recipe,
    load_recipe,
    open_run,
    print_json,
)
from .watch import carrier, carrier_as_json, choose_display, follow, live_figures

if TYPE_CHECKING:
    from ..pipeline.graph import Node
    from ..pipeline.progress import Figures
    from ..pipeline.run import Run

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

    display = choose_display(as_json, sys.stderr)
    path = find_recipe(recipe)
    try:
        job = Run(load_recipe(path, set_, auto), path.parent, runs, display, right)
        display.hint = _where_to_look(job)
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


def _where_to_look(job: Run) -> str:
    """Return the sentence that says where else the run can be seen: at a terminal, and in the studio."""
    runs = job.folder.parent
    option = "" if runs == RUNS else f" --runs {shlex.quote(str(runs))}"
    path = f"/runs/{quote(job.folder.name)}"
    return (
        f"follow it from elsewhere: limbeck watch {shlex.quote(str(job.folder))}, or limbeck serve{option} "
        f"and http://127.0.0.1:8000{path}"
    )


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
def status(
    run_folder: RunFolder,
    as_json: AsJson = False,
    follow_it: Annotated[
        bool, typer.Option("--follow", help="go on showing it until it ends, as `limbeck watch` does")
    ] = False,
) -> None:
    """Where a run stands: its stages, what is done right now, by whom, and for whom it waits."""
    if follow_it:
        follow(run_folder, as_json)
    graph = open_run(run_folder)
    figures = live_figures(run_folder)
    process = carrier(run_folder)
    rows = [_status(node, figures.get(node.name), process.begun) for node in graph.nodes.values()]
    if as_json:
        print_json(rows, run=carrier_as_json(process))
        return
    for row in rows:
        print(_status_line(row, run_folder, figures).rstrip())
    if process.state != "finished":
        print(process)


def _status_line(row: dict[str, Any], run_folder: Path, figures: dict[str, Figures]) -> str:
    """Return the line of one stage: its state, its name, and its artifact, its progress or what it waits
    for."""
    from .display import alarms, describe

    stage = row["stage"]
    detail = row["artifact"] or ""
    if row["state"] == "asks":
        command = f"limbeck curate {run_folder} {stage}"
        detail = f"{row['waiting_rows']} rows wait for a person: {command}"
    if row["begun"]:
        detail = "begun; goes on from its last checkpoint"
    if stage in figures:
        detail = "; ".join([describe(row["kind"], figures[stage]), *alarms(figures[stage])])
    return f"{STATES[row['state']]:10} {stage:32} {detail}"


def _status(node: Node, figures: Figures | None, begun: Collection[str]) -> dict[str, Any]:
    """Return one stage's name, kind, state, artifact, seconds, number of rows that wait for review, progress,
    and whether it was begun and is not at work: it is then among the stages `begun`."""
    from ..pipeline.review import review_queue

    artifact = node.artifact
    return {
        "stage": node.name,
        "kind": node.kind,
        "state": "running" if figures else node.state,
        "artifact": artifact and artifact.folder.name,
        "seconds": artifact and artifact.manifest["seconds"],
        "waiting_rows": len(review_queue.pending(node.queue)) if node.state == "asks" else 0,
        "begun": node.name in begun and not figures and not artifact,
        "progress": figures and asdict(figures),
    }
