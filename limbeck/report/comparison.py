"""Which of several ways of pretraining needs less compute for the same loss: curves over seeds, and where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .loaded_run import Run, StageView

POINTS = 100  # of a curve
LAST = 0.05  # share of a run over which its loss is averaged, at its end and everywhere else


@dataclass(frozen=True)
class Curve:
    """Loss against compute, a row a run: `Curve("dense", ("dense", "dense_2"), flops_P, losses_RP)`."""

    name: str
    runs: tuple[str, ...]
    flops: np.ndarray
    losses: np.ndarray

    @property
    def final(self) -> list[float]:
        return [float(loss) for loss in self.losses[:, -1]]

    def reaches(self, loss: float) -> float | None:
        """FLOPs after which the mean over runs is at most `loss` for the first time; None if it never is."""
        below = np.flatnonzero(self.losses.mean(0) <= loss)
        return float(self.flops[below[0]]) if len(below) else None


def curves(run: Run) -> list[Curve]:
    """Those that the report stage compares."""
    chosen = run.report_stage.get("compare") or {}
    found = {
        name: [stage for n in names if (stage := run.stage(n)) and stage.metrics]
        for name, names in chosen.items()
    }
    return [_curve(name, stages) for name, stages in found.items() if stages]


def _curve(name: str, stages: Sequence[StageView]) -> Curve:
    share = np.linspace(LAST, 1.0, POINTS)
    losses = np.stack([_smooth(stage, share) for stage in stages])
    total = float(np.mean([stage.manifest["flops"] for stage in stages]))
    return Curve(name, tuple(stage.name for stage in stages), share * total, losses)


def _smooth(stage: StageView, share: np.ndarray) -> np.ndarray:
    """Mean loss over the `LAST` of a run before each point; its text is read once, so this is loss on unseen text."""
    steps, losses = (np.asarray(column) for column in stage.column("loss"))
    done = (steps + 1) / (steps[-1] + 1)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.searchsorted(done, share, side="right")
    begins = np.minimum(np.searchsorted(done, share - LAST, side="right"), np.maximum(ends - 1, 0))
    return (sums[ends] - sums[begins]) / np.maximum(ends - begins, 1)


def compared(run: Run) -> dict[str, Any] | None:
    """For `report.json`: each way's final losses and FLOPs; and where the others reach the first one's final loss."""
    ways = curves(run)
    if len(ways) < 2:
        return None
    first = ways[0]
    target = float(np.mean(first.final))
    return {
        "target": target,
        "ways": {
            way.name: {
                "runs": list(way.runs),
                "final_losses": way.final,
                "flops": float(way.flops[-1]),
                "parameters": run.parameters(way.runs[0]),
                "reaches_target_after": way.reaches(target),
            }
            for way in ways
        },
    }
