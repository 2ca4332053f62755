"""Loss against compute for several ways of pretraining, averaged over seeds, and the compute at equal loss.

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
    """Loss against compute of one way: `Curve("dense", ("dense", "dense_2"), flops_P, losses_RP)`."""

    name: str
    runs: tuple[str, ...]
    flops: np.ndarray  # [P]
    losses: np.ndarray  # [R, P]

    @property
    def final(self) -> list[float]:
        """The final loss of each run."""
        return [float(loss) for loss in self.losses[:, -1]]

    def reaches(self, loss: float) -> float | None:
        """FLOPs after which the mean over runs is at most `loss` for the first time; None if it never is."""
        below = np.flatnonzero(self.losses.mean(0) <= loss)
        return float(self.flops[below[0]]) if len(below) else None


def curves(run: Run) -> list[Curve]:
    """The curves that the report stage compares; stages without metrics are left out."""
    ways = run.report_stage.get("compare") or {}
    compared = []
    for way, names in ways.items():
        stages = [run.stage(name) for name in names]
        measured = [stage for stage in stages if stage and stage.metrics]
        if measured:
            compared.append(_curve(way, measured))
    return compared


def _curve(name: str, stages: Sequence[StageView]) -> Curve:
    """The curve of one way from its runs; their mean FLOPs scale the axis."""
    share_P = np.linspace(AVERAGED_SHARE, 1.0, CURVE_POINTS)
    losses_RP = np.stack([_smooth(stage, share_P) for stage in stages])
    flops = np.mean([stage.manifest["flops"] for stage in stages])
    runs = tuple(stage.name for stage in stages)
    return Curve(name, runs, share_P * float(flops), losses_RP)


def _smooth(stage: StageView, share: np.ndarray) -> np.ndarray:
    """Mean loss [P] over the `AVERAGED_SHARE` of a run before each point of `share` [P].

    Pretraining reads its text once, so this is loss on unseen text.
    """
    steps, losses = stage.column("loss")
    done_S = (np.asarray(steps) + 1) / (steps[-1] + 1)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(losses))])  # [S + 1]
    ends_P = np.searchsorted(done_S, share, side="right")
    begins_P = np.searchsorted(done_S, share - AVERAGED_SHARE, side="right")
    begins_P = np.minimum(begins_P, np.maximum(ends_P - 1, 0))
    return (sums[ends_P] - sums[begins_P]) / np.maximum(ends_P - begins_P, 1)


def compare(run: Run) -> dict[str, Any] | None:
    """The comparison in `report.json`; None with fewer than two ways.

    For each way: final losses, FLOPs, and the FLOPs after which it reaches the first way's final loss.
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
