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
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..activity import PhaseReport
from ..pipeline.graph import Graph, Node
from ..pipeline.progress import CHUNKED_KINDS, Figures, Progress, Rate, TimeLeft
from ..pipeline.store import Artifact
from ..train.learning_signal import UNTAUGHT

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SLOW_STEP_SECONDS = 10.0  # seconds of a step after which its time is displayed
METRICS = ("reward", "accuracy", "length", "attempts", "language_consistency", "loss", "mode", "kept")


class Lines:
    """The display that prints plain lines on standard error: for each stage one line when it begins, one at
    least every ten seconds while it runs, one for each new alarm, and one when it ends.
    """

    every = 9.0  # seconds between two lines (or events) of a stage; runs look a few times a second

    def __init__(self, stream: TextIO | None = None) -> None:
        """Print on `stream`, by default standard error."""
        self.stream = stream
        self.hint = ""  # said when the first stage begins
        self.told_by_stages = UNTAUGHT  # how alarms begin that stages tell themselves, with an example
        self._shown: dict[str, float] = {}  # stage -> time of its latest line, in seconds
        self._rang: set[tuple[str, str]] = set()  # (stage, alarm) that was told

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        """Print one line for each stage in `running` that has had none yet or none for `every` seconds, and
        each new alarm.

        `running` maps the name of a running stage to its progress.
        """
        self._tell_news(running)
        now = time.monotonic()
        for name, progress in running.items():
            if name not in self._shown:
                self.say(f"{name}: begins")
            elif now - self._shown[name] >= self.every:
                self.say(f"{name}: {describe(progress.node.kind, progress.figures())}")
            else:
                continue
            self._shown[name] = now

    def _tell_news(self, running: dict[str, Progress]) -> None:
        """Print the hint if a first stage runs, and in full each alarm of the last steps that has not
        been told of its stage yet."""
        if running and self.hint:
            self.say(self.hint)
            self.hint = ""
        for name, progress in running.items():
            _, _, metrics = progress.look()
            for alarm in metrics.get("alarms") or ():
                if (name, alarm) not in self._rang and not alarm.startswith(self.told_by_stages):
                    self._rang.add((name, alarm))
                    self.say(f"{name}, step {metrics['step']}: ! {alarm}")

    def finished(self, node: Node, artifact: Artifact) -> None:
        """Print that the stage `node` is done, with its duration and main results from `artifact`."""
        self.say(f"{node.name}: done in {artifact.manifest['seconds']:.1f} s{outcome(artifact)}")

    def say(self, text: str) -> None:
        """Print a message for people, without control characters."""
        print(printable(text), file=self.stream or sys.stderr, flush=True)


class Events(Lines):
    """The display for programs: one JSON object a line (NDJSON) on standard output.

    For instance `{"event": "finished", "stage": ..., ...}`. The last line is the result of the command.
    """

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        """Emit a `progress` event for each stage in `running` that has had none for `every` seconds.

        `running` maps the name of a running stage to its progress.
        """
        self._tell_news(running)
        now = time.monotonic()
        for name, progress in running.items():
            if name not in self._shown or now - self._shown[name] >= self.every:
                self.emit("progress", stage=name, **asdict(progress.figures()))
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

    def __init__(self, stream: TextIO | None = None, width: int | None = None) -> None:
        """Draw on `stream`, by default standard error. `width` is that of the terminal, in columns, if it is
        not to be asked."""
        super().__init__(stream)
        console = Console(file=stream or sys.stderr, width=width)
        self.live = Live(console=console, refresh_per_second=4, transient=True)
        self.live.start()

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        """Draw the table anew, and print each new alarm above it, wrapped and not cut. `running` maps the
        name of a running stage to its progress."""
        self._tell_news(running)
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
        """Print a message above the table, without control characters; a long one is wrapped."""
        self.live.console.print(Text(printable(text), overflow="fold"))

    def close(self) -> None:
        """Remove the table and show the cursor again."""
        self.live.stop()


def _table_row(node: Node, progress: Progress | None) -> tuple[Text, Text | str, Text | str]:
    """Return the three cells of a stage in the table: a sign for its state, its name, and a description.

    `progress` is None unless the stage is running.
    """
    if progress:
        figures = progress.figures()
        lines = [describe(node.kind, figures), *alarms(figures)]
        return (
            Text("▶", "yellow"),
            Text(node.name, "bold"),
            Text(printable("\n".join(lines)), overflow="fold"),
        )
    if node.artifact:
        return Text("✓", "green"), node.name, Text(outcome(node.artifact).lstrip(" ,"), "dim")
    if node.state == "asks":
        return Text("?", "magenta"), node.name, "waits for a person: limbeck curate"
    return Text("·", "dim"), Text(node.name, "dim"), ""


# ---------------------------------------------------------------- progress of a stage


def describe(kind: str, figures: Figures) -> str:
    """Return the progress of a running stage of a kind as one line of text, without its alarms.

    The line has the steps, the time left, the work within a slow step, the speed and the latest metrics, for
    instance `12 of 60 steps · 40 to 90 s left · 3,400 tokens a second · reward 0.5 · accuracy 0.41`.

    While the stage's process is still preparing, the line says what it does and for how long.
    """
    words = []
    if figures.total is None:
        words.append(phases(figures.phases) or "its process starts")
        words.append(f"{span(figures.spent)} so far")
    else:
        unit = "parts" if kind in CHUNKED_KINDS else "steps"
        words.append(f"{figures.done} of {figures.total} {unit}")
    if figures.left:
        words.append(time_left(figures.left))
    if figures.total is not None and (figures.step_seconds >= SLOW_STEP_SECONDS or not figures.done):
        words.append(f"this one takes {span(figures.step_seconds)} so far")
        words += filter(None, [phases(figures.phases)])
    if figures.rate:
        words.append(speed(figures.rate))
    for name in METRICS:
        if figures.metrics.get(name) is not None:
            words.append(f"{name.replace('_', ' ')} {_number(figures.metrics[name])}")
    return " · ".join(words)


def alarms(figures: Figures) -> list[str]:
    """Return the alarms of the last logged step, each as a line of text: `step 12: ! length tripled`."""
    step = figures.metrics.get("step")
    return [f"step {step}: ! {alarm}" for alarm in figures.metrics.get("alarms") or ()]


def phases(reports: Sequence[PhaseReport]) -> str:
    """Return the phases of work as text: `sampling 3 of 8 problems, 40 of 128 rows`; "" if there are none."""
    words: list[str] = []
    told: tuple[int, int | None] | None = None
    for report in reports:
        counts = (report.done, report.total)
        if report.name or counts != told:  # one row for each problem: the rows are not told again
            words.append(" ".join(filter(None, [report.name, _count(report)])))
        told = counts
    return ", ".join(words)


def _count(report: PhaseReport) -> str:
    """Return the finished units of a phase as text: `40 of 128 rows`, `40 rows`, or "" without a unit."""
    if not report.unit:
        return ""
    total = "" if report.total is None else f" of {report.total:,}"
    return f"{report.done:,}{total} {report.unit}"


def speed(rate: Rate) -> str:
    """Return a rate as text, with two significant digits: `3,400 tokens a second`."""
    number = _round(rate.value) if rate.value >= 10 else f"{rate.value:.2g}"
    return f"{number} {rate.unit}"


def time_left(left: TimeLeft) -> str:
    """Return a phrase such as `40 to 90 s left`, or `at most 90 s left`."""
    low = span(left.low)
    high = span(left.high)
    if left.at_most:
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
