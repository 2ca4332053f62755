"""Who watches a run: a live tree on a terminal, plain lines elsewhere, JSON events for programs.

Data goes to standard output, everything said to people goes to standard error.
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
PATIENCE = 10.0  # seconds after which a step is slow enough to be told of
PARTS = {
    "sample": "parts",
    "screen": "parts",
    "pairs": "parts",
    "label": "parts",
    "evaluate": "parts",
}  # else steps of learning
SHOWN = ("reward", "accuracy", "length", "attempts", "language_consistency", "loss", "mode", "kept")


class Lines:
    """One line when a stage begins, every ten seconds, and when it ends."""

    every = 10.0

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        now = time.monotonic()
        for name, progress in running.items():
            if name not in self._said:
                self.say(f"{name}: begins")
            elif now - self._said[name] >= self.every:
                self.say(f"{name}: {describe(progress)}")
            else:
                continue
            self._said[name] = now

    def finished(self, node: Node, artifact: Artifact) -> None:
        self.say(f"{node.name}: done in {artifact.manifest['seconds']:.1f} s{outcome(artifact)}")

    def say(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)


class Events(Lines):
    """NDJSON on standard output: `{"event": "finished", "stage": ..., ...}`; the last one is the result."""

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        now = time.monotonic()
        for name, progress in running.items():
            if now - self._said.get(name, 0) >= self.every:
                done, total, metrics = progress.look()
                self.emit("progress", stage=name, done=done, total=total, metrics=metrics)
                self._said[name] = now

    def finished(self, node: Node, artifact: Artifact) -> None:
        manifest = artifact.manifest
        self.emit(
            "finished",
            stage=node.name,
            artifact=artifact.folder.name,
            seconds=manifest["seconds"],
            notes=manifest["notes"],
        )

    def say(self, text: str) -> None:
        self.emit("said", text=text)

    @staticmethod
    def emit(event: str, **details: Any) -> None:
        print(json.dumps({"schema": 1, "event": event, **details}, ensure_ascii=False), flush=True)


class Tree(Lines):
    """The stages as they stand, what runs now, and a thought now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
        self.live.start()

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        table = Table.grid(padding=(0, 2))
        for node in graph.nodes.values():
            if node.name in running:
                table.add_row(Text("▶", "yellow"), Text(node.name, "bold"), describe(running[node.name]))
            elif node.artifact:
                table.add_row(Text("✓", "green"), node.name, Text(outcome(node.artifact).lstrip(" ,"), "dim"))
            elif node.state == "asks":
                table.add_row(Text("?", "magenta"), node.name, "waits for a person: limbeck curate")
            else:
                table.add_row(Text("·", "dim"), Text(node.name, "dim"), "")
        thoughts = [panel for progress in running.values() if (panel := thought(progress))]
        self.live.update(Group(table, *thoughts))

    def finished(self, node: Node, artifact: Artifact) -> None:
        self.live.console.print(
            f"[green]✓[/] {node.name} [dim]{artifact.manifest['seconds']:.1f} s{outcome(artifact)}[/]"
        )

    def say(self, text: str) -> None:
        self.live.console.print(printable(text), highlight=False)

    def close(self) -> None:
        self.live.stop()


def describe(progress: Progress) -> str:
    """`12 of 60 steps · 40 to 90 s left · 3,400 tokens a second · reward 0.5 · accuracy 0.41 · length 37`."""
    done, total, metrics = progress.look()
    preparing = progress.preparing()
    if total is None or preparing:
        return f"{preparing or 'its process starts'} · {span(progress.spent)} so far"
    pace = progress.pace()
    words = [f"{done} of {total} {PARTS.get(progress.node.kind, 'steps')}"]
    if pace.steps and done < total:
        words.append(left(pace, total - done, _may_end_early(progress.node.stage)))
    if pace.since >= PATIENCE or not done:
        words.append(f"this one takes {span(pace.since)} so far")
    if pace.tokens:
        words.append(f"{_round(pace.tokens / pace.seconds)} tokens a second")
    words += [
        f"{name.replace('_', ' ')} {_number(metrics[name])}"
        for name in SHOWN
        if metrics.get(name) is not None
    ]
    words += [f"! {alarm}" for alarm in metrics.get("alarms", ())[:1]]
    return " · ".join(words)


def left(pace: Pace, steps: int, at_most: bool = False) -> str:
    """Time left by the measured rate: a range that narrows with every look, and one number after ten."""
    seconds = max(0.0, pace.seconds / pace.steps * steps - pace.since)
    wide = 1 + 1 / pace.looks if pace.looks < RECENT else 1
    low, high = span(seconds / wide), span(seconds * wide)
    if at_most or low == high:
        return f"{'at most ' * at_most}{high} left"
    number, unit = low.split()
    return f"{number if high.endswith(f' {unit}') else low} to {high} left"


def span(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _may_end_early(stage: Stage) -> bool:
    """A budget may end it before its last step."""
    return stage.kind in ("rl", "distill") and bool(stage.flops or stage.flops_of)


def _round(value: float) -> str:
    """Two digits, and thousands apart: 3,400."""
    return f"{float(f'{value:.2g}'):,.0f}"


def outcome(artifact: Artifact) -> str:
    """The few numbers that say how a stage went."""
    notes = artifact.manifest["notes"]
    if "kept" in notes:
        return f", kept {notes['kept']} of {notes['sampled']}"
    if "policy" in notes:
        return f", {notes['accepted'] + notes['edited']} rows by {notes['policy']}, {notes['edited']} edited"
    path = artifact.folder / "evaluation.json"
    if path.exists():
        source = next(iter(json.loads(path.read_text(encoding="utf-8"))["sources"].values()))
        return ", " + ", ".join(
            f"{mode} {entry['accuracy']['mean']:.1%}" for mode, entry in source["modes"].items()
        )
    return ""


def thought(progress: Progress) -> Panel | None:
    """The response that was written down last."""
    row = progress.thought()
    if not row.get("completions"):
        return None
    best = max(row["completions"], key=lambda c: c["reward"] or 0)
    text = Text(printable(f"{row['prompt'][-300:]}\n{best['text'][:600]}"))
    return Panel(
        text,
        title=f"{progress.node.name}, step {row['step']}",
        title_align="left",
        border_style="dim",
        width=100,
    )


def printable(text: str) -> str:
    """Model text may hold escape sequences; a terminal must not obey them."""
    return CONTROL.sub("", text)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
