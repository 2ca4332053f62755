"""The commands that carry out a recipe and show the state of its stages: run, status."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import sys
from collections.abc import Sequence
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
    Device,
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
Loggers = Annotated[
    list[str],
    typer.Option(
        "--log",
        metavar="LOGGER",
        help="write metrics for tensorboard, wandb or jsonl, too; may be repeated",
        show_default=False,
    ),
]

Right = Annotated[
    str | None,
    typer.Option(
        "--i-have-the-right",
        metavar="REASON",
        help="do what a teacher's terms forbid; recorded for ever",
        show_default=False,
    ),
]
HostsFile = Annotated[
    Path | None,
    typer.Option(
        "--hosts",
        metavar="FILE",
        help="what samples and grades: processes as a file says (docs/how-to/several-machines.md)",
        show_default=False,
    ),
]


@app.command()
def run(
    recipe: RecipeFile,
    runs: Home = RUNS,
    set_: Overrides = [],  # noqa: B006
    auto: Auto = False,
    log: Loggers = [],  # noqa: B006
    as_json: AsJson = False,
    device: Device = "cpu",
    hosts: HostsFile = None,
    no_try: Annotated[
        bool, typer.Option("--no-try", help="start stages without first showing a few of their answers")
    ] = False,
    right: Right = None,
) -> None:
    """Carry a recipe out; what is done already is not done again. Ctrl-C checkpoints and stops.

    For instance: `limbeck run quickstart --auto`
    """
    from ..config.hosts import load_hosts
    from ..pipeline.run import Run
    from .display import Events, Tree

    display = choose_display(as_json, sys.stderr)
    path = find_recipe(recipe)
    try:
        seats = load_hosts(hosts) if hosts else None
        job = Run(load_recipe(path, set_, auto), path.parent, runs, display, right, device, hosts=seats)
        job.previews = not no_try
        page = carry_out(job, log)
    finally:
        ignore_interrupts()
        if isinstance(display, Tree):
            display.close()
    if as_json:
        Events.emit("result", ok=True, report=str(page) if page else None)
    elif page:
        print(f"The report is at {page}")


def carry_out(job: Run, log: Sequence[str] = ()) -> Path | None:
    """Carry a run out, from its forecast to its report, whose page is returned; Ctrl-C stops it resumably.
    `log` names the loggers that are given its metrics, too."""
    from ..pipeline.loggers.stream import log_metrics
    from .recipe_plan import cached_forecast

    job.display.hint = _where_to_look(job)
    _stop_on_interrupt(job)
    with log_metrics(job, log):
        return job.execute(cached_forecast(job.graph))


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


def ignore_interrupts() -> None:
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
    rows = []
    for node in graph.nodes.values():
        partial = graph.store.root / ".partial" / process.begun.get(node.name, "")
        rows.append(_status(node, figures.get(node.name), partial if node.name in process.begun else None))
    if as_json:
        print_json(rows, run=carrier_as_json(process))
        return
    for row in rows:
        print(_status_text(row, run_folder, figures).rstrip())
    if process.state != "finished":
        print(process)


def _status_text(row: dict[str, Any], run_folder: Path, figures: dict[str, Figures]) -> str:
    """Return the lines of one stage: its state, its name, and its artifact, its progress or what it waits
    for; below, its alarms, and whether it went on on another kind of device."""
    from .display import describe, printable

    stage = row["stage"]
    detail = row["artifact"] or ""
    if row["state"] == "asks":
        command = f"limbeck curate {run_folder} {stage}"
        detail = f"{row['waiting_rows']} rows wait for a person: {command}"
    if row["unchanged"]:
        detail += "; weights unchanged"
    if row["begun"]:
        detail = "begun; goes on from its last checkpoint"
    if stage in figures:
        detail = describe(row["kind"], figures[stage])
    lines = [f"{STATES[row['state']]:10} {stage:32} {detail}"]
    notes = [*row["alarms"], *filter(None, [row["devices"]])]
    return "\n".join([*lines, *(f"{'':10} ! {printable(note)}" for note in notes)])


def _status(node: Node, figures: Figures | None, partial: Path | None) -> dict[str, Any]:
    """Return one stage's name, kind, state, artifact, seconds, number of rows that wait for review, whether
    it left its weights unchanged, the alarms of its latest step if it has begun, its progress, whether it was
    begun and is not at work, and the sentence about its devices if there were several.

    `partial` is the folder that a stage that has begun works in.
    """
    from ..pipeline.review import review_queue
    from ..pipeline.stage_device import changed_device

    artifact = node.artifact
    return {
        "stage": node.name,
        "kind": node.kind,
        "state": "running" if figures else node.state,
        "artifact": artifact and artifact.folder.name,
        "seconds": artifact and artifact.manifest["seconds"],
        "waiting_rows": len(review_queue.pending(node.queue)) if node.state == "asks" else 0,
        "unchanged": bool(artifact) and artifact.manifest["notes"].get("weights_changed") is False,
        "alarms": _alarms(partial) if partial and not artifact else [],
        "begun": bool(partial) and not figures and not artifact,
        "progress": figures and asdict(figures),
        "devices": changed_device(artifact.manifest if artifact else {}, None if artifact else partial),
    }


def _alarms(partial: Path) -> list[str]:
    """Return the alarms of the latest step that was logged in a folder, and a response if its rewards taught
    nothing.
    """
    from ..run_log import ROLLOUTS, quote, read, read_metrics
    from ..train.learning_signal import UNTAUGHT

    *_, latest = [{}, *read_metrics(partial)]
    alarms = list(latest.get("alarms", []))
    if any(alarm.startswith(UNTAUGHT) for alarm in alarms):
        alarms += [quote(row) for row in itertools.islice(read(partial / ROLLOUTS), 1)]
    return alarms
