"""Pictures of a plan, as SVG: what every chip of a pipeline does when, and what layouts trade against one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .pipeline_schedules import Slot, Timeline
from .search import Choice

COLOURS = {"F": "#4c78a8", "B": "#f58518", "BW": "#e45756", "W": "#54a24b", "FBW": "#b279a2"}
NAMES = {
    "F": "forward",
    "B": "backward, inputs",
    "BW": "backward",
    "W": "weight gradients",
    "FBW": "forward and backward, overlapped",
}


def schedule(line: Timeline, path: Path, title: str = "") -> Path:
    """A Gantt chart: a row a chip, time to the right, idle time left white. Micro-batches bear their number where it
    can be read."""
    figure, axes = _figure(11, 0.32 * len(line.chips) + 1.6)
    numbered = sum(len(slots) for slots in line.chips) < 600
    for chip, slots in enumerate(line.chips):
        for kind, colour in COLOURS.items():
            own = [slot for slot in slots if _kind(slot) == kind]
            axes.broken_barh(
                [(s.start, s.end - s.start) for s in own],
                (chip - 0.45, 0.9),
                facecolors=colour,
                edgecolor="white",
                linewidth=0.3,
            )
            for slot in own if numbered else ():
                middle = (slot.start + slot.end) / 2
                axes.text(
                    middle,
                    chip,
                    str(slot.pieces[0].micro),
                    ha="center",
                    va="center",
                    fontsize=5,
                    color="white",
                )
    axes.set_yticks(range(len(line.chips)), [f"chip {chip}" for chip in range(len(line.chips))])
    axes.invert_yaxis()
    axes.set_xlim(0, line.seconds)
    axes.set_xlabel("seconds")
    axes.set_title(
        f"{title}: {line.seconds:.3g} s, of which the busiest chip waits {line.bubble:.3g} s".lstrip(": ")
    )
    seen = {_kind(slot) for slots in line.chips for slot in slots}
    handles = [_patch(COLOURS[kind], NAMES[kind]) for kind in COLOURS if kind in seen]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18 - 0.6 / len(line.chips)),
        ncol=len(handles),
        frameon=False,
    )
    return _save(figure, path)


def trade(choices: list[Choice], path: Path) -> Path:
    """Seconds a step against memory, a point a layout; the line is the chips' memory."""
    figure, axes = _figure(8, 4.5)
    for rank, choice in enumerate(choices, 1):
        held, step = choice.memory.total / 1e9, choice.step
        axes.errorbar(
            held,
            step.seconds,
            yerr=[[step.seconds - step.low], [step.high - step.seconds]],
            fmt="o",
            color=COLOURS["F"],
            capsize=3,
        )
        axes.annotate(f" {rank}. {choice.layout.tell().split(',')[0]}", (held, step.seconds), fontsize=8)
    axes.axvline(choices[0].memory.capacity / 1e9, color=COLOURS["BW"], linestyle="--", linewidth=1)
    axes.set_xlabel("GB on the fullest chip (dashed: what it has)")
    axes.set_ylabel("seconds a step")
    return _save(figure, path)


def _kind(slot: Slot) -> str:
    return "".join(piece.kind for piece in slot.pieces)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _patch(colour: str, name: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=name)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    return path
