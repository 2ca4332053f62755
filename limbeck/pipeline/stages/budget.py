"""The FLOP budget of a training stage, and the FLOPs that its data has cost."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ...config.parts import Budgeted
from ...model.config import ModelConfig
from ...types import LimbeckError, Sample
from ..job import Job


def data_flops(job: Job, names: Iterable[str]) -> float:
    """Return the FLOPs of making the rows of the stages `names`, with all stages before them. The sampling
    and scoring by teachers is included."""
    manifests = [job.manifest(name) for name in names]
    return float(sum(m["flops"] + m["notes"].get("data_flops", 0) for m in manifests))


def budget_of(job: Job, data: Iterable[str] = ()) -> float:
    """Return the FLOPs that a stage may spend on training: as many as the training of another stage took
    (`flops_of`), and as its rows took if `flops_of_rows` is set; or the setting `flops` minus the cost of
    its data; or infinity if neither is set. `data` are the names of the stages that made the data.

    Raises LimbeckError if the data alone cost as much as `flops` or more.
    """
    stage: Budgeted = job.stage
    if stage.flops_of:
        compared = job.manifest(stage.flops_of)
        return compared["flops"] + (compared["notes"].get("data_flops", 0) if stage.flops_of_rows else 0)
    if not stage.flops:
        return math.inf
    spent = data_flops(job, data)
    if spent >= stage.flops:
        raise LimbeckError(
            f"stages.{job.name}.flops: its rows alone took {spent:.3g} of {stage.flops:.3g}; "
            "allow more, or sample less"
        )
    return stage.flops - spent


def affordable(
    plan: list[list[int]], samples: list[Sample], config: ModelConfig, budget: float
) -> list[list[int]]:
    """Return the first batches of a plan whose training costs at most `budget` FLOPs, but at least one batch.
    A plan is a list of batches, each a list of indices into `samples`."""
    if math.isinf(budget):
        return plan
    costs = []
    for batch in plan:
        lengths = [len(samples[i].tokens) for i in batch]
        costs.append(sum(n * config.flops_per_token(n / 2, backward=True) for n in lengths))
    count = int(np.searchsorted(np.cumsum(costs), budget, side="right"))
    return plan[: max(1, count)]


def forward_flops(samples: Iterable[Sample], config: ModelConfig) -> float:
    """Return the FLOPs of one forward pass over the samples. Each token is counted as attending to half of
    its sequence."""
    return sum(len(sample.tokens) * config.flops_per_token(len(sample.tokens) / 2) for sample in samples)
