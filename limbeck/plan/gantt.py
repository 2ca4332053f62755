"""Pictures of a plan as SVG: the schedule of a pipeline, and step time against memory for several layouts."""

from __future__ import annotations

from collections.abc import Iterable
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
MOST_NUMBERED = 600  # slots of a picture in which numbers can be read


def schedule(line: Timeline, path: Path, title: str = "") -> Path:
    """Draw a pipeline's schedule as a Gantt chart, write it to `path` and return `path`.

    Each chip has one line, and time runs to the right. In small charts each slot shows the number of its
    micro-batch.
    """
    figure, axes = _figure(11, 0.32 * len(line.chips) + 1.6)
    numbered = sum(len(slots) for slots in line.chips) < MOST_NUMBERED
    for chip, slots in enumerate(line.chips):
        for kind in COLOURS:
            _draw_slots(axes, chip, kind, [slot for slot in slots if _kind(slot) == kind], numbered)
    axes.set_yticks(range(len(line.chips)), [f"chip {chip}" for chip in range(len(line.chips))])
    axes.invert_yaxis()
    axes.set_xlim(0, line.seconds)
    axes.set_xlabel("seconds")
    times = f"{line.seconds:.3g} s, of which the busiest chip waits {line.bubble:.3g} s"
    axes.set_title(f"{title}: {times}".lstrip(": "))
    _draw_legend(axes, {_kind(slot) for slots in line.chips for slot in slots}, len(line.chips))
    return _save(figure, path)


def trade(choices: list[Choice], path: Path) -> Path:
    """Draw seconds a step against memory, one point for each layout; write to `path` and return it.

    The dashed line is the memory that a chip has.
    """
    figure, axes = _figure(8, 4.5)
    for rank, choice in enumerate(choices, 1):
        step = choice.step
        gigabytes = choice.memory.total / 1e9
        axes.errorbar(
            gigabytes,
            step.seconds,
            yerr=[[step.seconds - step.low], [step.high - step.seconds]],
            fmt="o",
            color=COLOURS["F"],
            capsize=3,
        )
        label = choice.layout.tell().split(",")[0]
        axes.annotate(f" {rank}. {label}", (gigabytes, step.seconds), fontsize=8)
    axes.axvline(choices[0].memory.capacity / 1e9, color=COLOURS["BW"], linestyle="--", linewidth=1)
    axes.set_xlabel("GB on the fullest chip (dashed: what it has)")
    axes.set_ylabel("seconds a step")
    return _save(figure, path)


def _draw_slots(axes: Any, chip: int, kind: str, slots: list[Slot], numbered: bool) -> None:
    """Draw the slots of one kind of pass in the line of one chip.

    `numbered` adds the micro-batch's number to each slot.
    """
    axes.broken_barh(
        [(slot.start, slot.end - slot.start) for slot in slots],
        (chip - 0.45, 0.9),
        facecolors=COLOURS[kind],
        edgecolor="white",
        linewidth=0.3,
    )
    if not numbered:
        return
    for slot in slots:
        axes.text(
            (slot.start + slot.end) / 2,
            chip,
            str(slot.pieces[0].micro),
            ha="center",
            va="center",
            fontsize=5,
            color="white",
        )


def _draw_legend(axes: Any, kinds: Iterable[str], chips: int) -> None:
    """Draw the legend, with the colours of the kinds in `kinds`, below a chart of `chips` lines."""
    handles = [_patch(COLOURS[kind], NAMES[kind]) for kind in COLOURS if kind in kinds]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18 - 0.6 / chips),
        ncol=len(handles),
        frameon=False,
    )


def _kind(slot: Slot) -> str:
    """Return the kinds of a slot's passes as one string, such as `F`, or `FBW` for an overlapped pair."""
    return "".join(piece.kind for piece in slot.pieces)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a matplotlib figure of the given size in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _patch(colour: str, name: str) -> Any:
    """Return a legend entry: a patch of `colour` with the label `name`."""
    from matplotlib.patches import Patch

    return Patch(color=colour, label=name)


def _save(figure: Any, path: Path) -> Path:
    """Write the figure to `path` as SVG and return `path`.

    No date is written, so the same figure gives the same file except for element ids.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    return path
