"""How cost grows with the model, the batch, the length and the cores: measured, and drawn.

    python -m bench.curves docs/performance

Rollouts in tokens said a second, updates in tokens learned a second; every point is the median of its turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from limbeck.model.config import ModelConfig

from . import models
from .sides import Side, alternate, roofline

ROWS, LENGTHS, CORES, SIZES = (1, 8, 64, 256), (16, 64, 256), (1, 2), tuple(models.SIZES)
PROMPT = 64  # tokens
Point = tuple[float, float, float]  # where, rollout's tokens a second, update's


def main() -> None:
    """Measure all curves, then write them as JSON and as a chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where curves.svg and curves.json go")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    small = SIZES[:2]
    curves: dict[str, dict[str, list[Point]]] = {
        "rows at once": {
            size: [(n, *measure(size, rows=n, repeats=options.repeats)) for n in ROWS] for size in small
        },
        "tokens of an answer": {
            size: [(n, *measure(size, new=n, repeats=options.repeats)) for n in LENGTHS] for size in small
        },
        "million parameters": {
            f"{cores} core(s)": [
                (parameters(size), *measure(size, cores=cores, new=24, repeats=options.repeats))
                for size in SIZES
            ]
            for cores in CORES
        },
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    facts = {"roofline": roofline(1), "curves": curves}
    (options.folder / "curves.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draw(curves, options.folder / "curves.svg")


def measure(
    size: str, rows: int = 16, new: int = 64, cores: int = 1, repeats: int = 3
) -> tuple[float, float]:
    """Tokens a second of rollouts, and of the update that learns them."""
    folder, group, vocabulary = str(models.make(size)), min(rows, 8), models.SIZES[size][0]
    asked = {
        "model": folder,
        "texts": models.prompts(max(1, rows // group), PROMPT, vocabulary),
        "group": group,
        "new": new,
        "gflop": 0.0,
    }
    learned = {
        "model": folder,
        "prompts": max(1, rows // group),
        "lengths": [new] * group,
        "new": new,
        "width": PROMPT,
        "batch_tokens": 4096,
    }
    print(f"{size}, {rows} rows, {new} tokens, {cores} core(s)", file=sys.stderr, flush=True)
    sides = [
        Side("rollout", "limbeck_rollout.py", sys.executable, asked, cores),
        Side("update", "limbeck_update.py", sys.executable, learned, cores),
    ]
    timed = alternate(sides, repeats)
    return timed["rollout"].medians["tokens_per_second"], rows * new / timed["update"].seconds[1]


def parameters(size: str) -> float:
    """Millions of parameters of a model size."""
    return ModelConfig.from_directory(models.make(size)).parameters / 1e6


def draw(curves: dict[str, dict[str, list[Point]]], path: Path) -> None:
    """Draw the curves, one panel for each variable."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.6), layout="constrained")
    for axis, (label, lines) in zip(axes, curves.items(), strict=True):
        for colour, (name, points) in zip(("#2b6cb0", "#c05621", "#2f855a"), lines.items(), strict=False):
            where, said, learned = zip(*points, strict=True)
            axis.plot(where, said, "o-", color=colour, label=f"{name}, rollout", markersize=3)
            axis.plot(where, learned, "s--", color=colour, label=f"{name}, update", markersize=3)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="tokens a second")
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
