"""Displays of a run in progress: a live table on a terminal, plain lines elsewhere, JSON events for programs.

Events for programs go to standard output, messages for people to standard error.

All displays have the methods `show`, `finished` and `say`. A stage is one step of a recipe; its artifact is
the folder with its results, described by the artifact's manifest.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..config.recipe import Stage
from ..pipeline.graph import Graph, Node
from ..pipeline.progress import RECENT, Pace, Progress
from ..pipeline.store import Artifact

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SLOW_STEP_SECONDS = 10.0  # seconds of a step after which its time is displayed
CHUNKED_KINDS = ("sample", "screen", "pairs", "label", "evaluate")  # their steps are parts of the work
METRICS = ("reward", "accuracy", "length", "attempts", "language_consistency", "loss", "mode", "kept")


class Lines:
    """The display that prints plain lines on standard error: for each stage one line when it begins, one
    every ten seconds while it runs, and one when it ends.
    """

    every = 10.0  # seconds between two lines (or events) of a stage

    def __init__(self) -> None:
        self._shown: dict[str, float] = {}  # stage -> time of its latest line, in seconds

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        """Print one line for each stage in `running` that has had none yet or none for `every` seconds.

        `running` maps the name of a running stage to its progress.
        """
        now = time.monotonic()
        for name, progress in running.items():
            if name not in self._shown:
                self.say(f"{name}: begins")
            elif now - self._shown[name] >= self.every:
                self.say(f"{name}: {describe(progress)}")
            else:
                continue
            self._shown[name] = now

    def finished(self, node: Node, artifact: Artifact) -> None:
        """Print that the stage `node` is done, with its duration and main results from `artifact`."""
        self.say(f"{node.name}: done in {artifact.manifest['seconds']:.1f} s{outcome(artifact)}")

    def say(self, text: str) -> None:
        """Print a message for people, without control characters."""
        print(printable(text), file=sys.stderr, flush=True)


class Events(Lines):
    """The display for programs: one JSON object a line (NDJSON) on standard output.

    For instance `{"event": "finished", "stage": ..., ...}`. The last line is the result of the command.
    """

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        """Emit a `progress` event for each stage in `running` that has had none for `every` seconds.

        `running` maps the name of a running stage to its progress.
        """
        now = time.monotonic()
        for name, progress in running.items():
            if now - self._shown.get(name, 0) >= self.every:
                done, total, metrics = progress.look()
                self.emit("progress", stage=name, done=done, total=total, metrics=metrics)
                self._shown[name] = now

    def finished(self, node: Node, artifact: Artifact) -> None:
        """Emit a `finished` event with the artifact's folder name, the seconds and the notes of the stage
        `node`.
        """
        manifest = artifact.manifest
        self.emit(
            "finished",
            stage=node.name,
            artifact=artifact.folder.name,
            seconds=manifest["seconds"],
            notes=manifest["notes"],
        )

    def say(self, text: str) -> None:
        """Emit a message for people as an event called `said`."""
        self.emit("said", text=text)

    @staticmethod
    def emit(event: str, **details: Any) -> None:
        """Print one event as a line of JSON, with `details` as its further fields."""
        print(json.dumps({"schema": 1, "event": event, **details}, ensure_ascii=False), flush=True)


class Tree(Lines):
    """The display on a terminal: a live table of all stages and, below it, for each running stage the best
    response of the group of responses recorded last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
        self.live.start()

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        """Draw the table anew. `running` maps the name of a running stage to its progress."""
        table = Table.grid(padding=(0, 2))
        for node in graph.nodes.values():
            table.add_row(*_table_row(node, running.get(node.name)))
        panels = [response_panel(progress) for progress in running.values()]
        self.live.update(Group(table, *filter(None, panels)))

    def finished(self, node: Node, artifact: Artifact) -> None:
        """Print a line above the table: the stage `node` is done, with its duration and main results."""
        detail = f"{artifact.manifest['seconds']:.1f} s{outcome(artifact)}"
        self.live.console.print(f"[green]✓[/] {node.name} [dim]{detail}[/]")

    def say(self, text: str) -> None:
        """Print a message above the table, without control characters."""
        self.live.console.print(printable(text), highlight=False)

    def close(self) -> None:
        """Remove the table and show the cursor again."""
        self.live.stop()


def _table_row(node: Node, progress: Progress | None) -> tuple[Text, Text | str, Text | str]:
    """Return the three cells of a stage in the table: a sign for its state, its name, and a description.

    `progress` is None unless the stage is running.
    """
    if progress:
        return Text("▶", "yellow"), Text(node.name, "bold"), describe(progress)
    if node.artifact:
        return Text("✓", "green"), node.name, Text(outcome(node.artifact).lstrip(" ,"), "dim")
    if node.state == "asks":
        return Text("?", "magenta"), node.name, "waits for a person: limbeck curate"
    return Text("·", "dim"), Text(node.name, "dim"), ""


# ---------------------------------------------------------------- progress of a stage


def describe(progress: Progress) -> str:
    """Return the progress of a running stage as one line of text.

    The line has the steps, the time left, the speed and the latest metrics, for instance
    `12 of 60 steps · 40 to 90 s left · 3,400 tokens a second · reward 0.5 · accuracy 0.41 · length 37`.

    While the stage's process is still preparing, the line says what it does and for how long.
    """
    done, total, metrics = progress.look()
    preparing = progress.preparing()
    if total is None or preparing:
        return f"{preparing or 'its process starts'} · {span(progress.spent)} so far"
    unit = "parts" if progress.node.kind in CHUNKED_KINDS else "steps"
    words = [f"{done} of {total} {unit}", *_timing(progress, done, total)]
    for name in METRICS:
        if metrics.get(name) is not None:
            words.append(f"{name.replace('_', ' ')} {_number(metrics[name])}")
    words += [f"! {alarm}" for alarm in metrics.get("alarms", ())[:1]]
    return " · ".join(words)


def _timing(progress: Progress, done: int, total: int) -> list[str]:
    """Return up to three phrases: the time left, the time that a slow current step has taken, and the tokens
    a second.

    A phrase is left out where its number is not known. `done` and `total` are numbers of steps.
    """
    pace = progress.pace()
    words = []
    if pace.steps and done < total:
        words.append(time_left(pace, total - done, _may_end_early(progress.node.stage)))
    if pace.since >= SLOW_STEP_SECONDS or not done:
        words.append(f"this one takes {span(pace.since)} so far")
    if pace.tokens:
        words.append(f"{_round(pace.tokens / pace.seconds)} tokens a second")
    return words


def time_left(pace: Pace, steps: int, at_most: bool = False) -> str:
    """Return a phrase such as `40 to 90 s left`: the time that `steps` more steps take at the measured rate.

    The range narrows with every measurement of the rate; after ten measurements the phrase has one number.
    With `at_most` it is `at most 90 s left`, for a stage that may end before its last step.
    """
    seconds = max(0.0, pace.seconds / pace.steps * steps - pace.since)
    factor = 1 + 1 / pace.looks if pace.looks < RECENT else 1
    low = span(seconds / factor)
    high = span(seconds * factor)
    if at_most:
        return f"at most {high} left"
    if low == high:
        return f"{high} left"
    number, unit = low.split()
    if high.endswith(f" {unit}"):
        low = number
    return f"{low} to {high} left"


def span(seconds: float) -> str:
    """Return a duration as text in the largest unit that suits it: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _may_end_early(stage: Stage) -> bool:
    """Return True for an RL or distillation stage that has a budget of FLOPs, which may end it before its
    last step.
    """
    return stage.kind in ("rl", "distill") and bool(stage.flops or stage.flops_of)


def _round(value: float) -> str:
    """Return a number rounded to two significant digits, with separators of thousands: `3,400`."""
    return f"{float(f'{value:.2g}'):,.0f}"


def _number(value: Any) -> str:
    """Return the value of a metric as text: a float with three significant digits, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- results and responses


def outcome(artifact: Artifact) -> str:
    """Return the main results of a finished stage as text that continues a line: `, kept 512 of 2048`.

    Return "" if the stage's kind has no such results.
    """
    notes = artifact.manifest["notes"]
    if notes.get("weights_changed") is False:
        return ", weights unchanged"
    if "kept" in notes:
        return f", kept {notes['kept']} of {notes['sampled']}"
    if "policy" in notes:
        return f", {notes['accepted'] + notes['edited']} rows by {notes['policy']}, {notes['edited']} edited"
    path = artifact.folder / "evaluation.json"
    if not path.exists():
        return ""
    sources = json.loads(path.read_text(encoding="utf-8"))["sources"]
    modes = next(iter(sources.values()))["modes"]
    accuracies = [f"{mode} {entry['accuracy']['mean']:.1%}" for mode, entry in modes.items()]
    return ", " + ", ".join(accuracies)


def response_panel(progress: Progress) -> Panel | None:
    """Return a panel with the best response (the highest reward) of the group of responses that was recorded
    last.

    Return None before the first group is recorded.
    """
    row = progress.thought()
    if not row.get("completions"):
        return None
    best = max(row["completions"], key=lambda completion: completion["reward"] or 0)
    text = Text(printable(f"{row['prompt'][-300:]}\n{best['text'][:600]}"))
    title = f"{progress.node.name}, step {row['step']}"
    return Panel(text, title=title, title_align="left", border_style="dim", width=100)


def printable(text: str) -> str:
    """Return the text without control characters, so that a model's output cannot send escape sequences to
    the terminal.
    """
    return CONTROL.sub("", text)
