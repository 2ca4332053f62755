"""Comparison of several ways of pretraining: loss against compute, averaged over seeds, and the compute at
which the losses are equal.

A way is one setting of pretraining (such as a dense model or a mixture of experts), trained once for each
seed.

Shapes: R runs (seeds) of one way, P points of a curve, S logged steps of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .loaded_run import Run, StageView

CURVE_POINTS = 100  # points of a curve
AVERAGED_SHARE = 0.05  # of a run: every loss on a curve is the mean over the last 5 % of the run before it


@dataclass(frozen=True)
class Curve:
    """Loss against compute of one way of pretraining.

    `Curve("dense", ("dense", "dense_2"), flops_P, losses_RP)` is the way dense. `runs` are the names of its
    stages, one for each seed; all of them share the FLOPs axis.
    """

    name: str
    runs: tuple[str, ...]
    flops: np.ndarray  # [P]
    losses: np.ndarray  # [R, P]

    @property
    def final(self) -> list[float]:
        """The loss of each run at the end of its training."""
        return [float(loss) for loss in self.losses[:, -1]]

    def reaches(self, loss: float) -> float | None:
        """Return the FLOPs at which the mean loss over the runs is at most `loss` for the first time, or
        None if it never is.
        """
        below = np.flatnonzero(self.losses.mean(0) <= loss)
        return float(self.flops[below[0]]) if len(below) else None


def curves(run: Run) -> list[Curve]:
    """Return the curve of each way that the recipe's report stage compares.

    Stages without logged metrics are left out.
    """
    ways = run.report_stage.get("compare") or {}
    compared = []
    for way, names in ways.items():
        stages = [run.stage(name) for name in names]
        measured = [stage for stage in stages if stage and stage.metrics]
        if measured:
            compared.append(_curve(way, measured))
    return compared


def _curve(name: str, stages: Sequence[StageView]) -> Curve:
    """Return the curve of the way `name` from its runs, the `stages`.

    The FLOPs axis ends at the mean of the runs' FLOPs.
    """
    share_P = np.linspace(AVERAGED_SHARE, 1.0, CURVE_POINTS)
    losses_RP = np.stack([_smooth(stage, share_P) for stage in stages])
    flops = np.mean([stage.manifest["flops"] for stage in stages])
    runs = tuple(stage.name for stage in stages)
    return Curve(name, runs, share_P * float(flops), losses_RP)


def _smooth(stage: StageView, share: np.ndarray) -> np.ndarray:
    """Return the smoothed loss [P] of a run at the points `share` [P], which are parts of the run from 0
    to 1.

    The loss at a point is the mean over the preceding part of the run, `AVERAGED_SHARE` long. Pretraining
    reads each text once, so this is the loss on unseen text.
    """
    steps, losses = stage.column("loss")
    done_S = (np.asarray(steps) + 1) / (steps[-1] + 1)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(losses))])  # [S + 1]
    ends_P = np.searchsorted(done_S, share, side="right")
    begins_P = np.searchsorted(done_S, share - AVERAGED_SHARE, side="right")
    begins_P = np.minimum(begins_P, np.maximum(ends_P - 1, 0))
    return (sums[ends_P] - sums[begins_P]) / np.maximum(ends_P - begins_P, 1)


def compare(run: Run) -> dict[str, Any] | None:
    """Return the field `comparison` of `report.json`, or None if fewer than two ways can be compared.

    For each way it holds the runs' final losses, the FLOPs, the parameters, and the FLOPs at which the way
    reaches the final loss of the first way.
    """
    ways = curves(run)
    if len(ways) < 2:
        return None
    target = float(np.mean(ways[0].final))
    described = {}
    for way in ways:
        described[way.name] = {
            "runs": list(way.runs),
            "final_losses": way.final,
            "flops": float(way.flops[-1]),
            "parameters": run.parameters(way.runs[0]),
            "reaches_target_after": way.reaches(target),
        }
    return {"target": target, "ways": described}
