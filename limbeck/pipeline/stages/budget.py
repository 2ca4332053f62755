"""FLOPs that a learning stage may spend, and those that its data took."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ...config.parts import Budgeted
from ...model.config import ModelConfig
from ...types import LimbeckError, Sample
from ..job import Job


def data_flops(job: Job, names: Iterable[str]) -> float:
    """FLOPs of making the rows of some stages, teachers' sampling and scoring included, back to their
    beginning."""
    manifests = [job.manifest(name) for name in names]
    return float(sum(m["flops"] + m["notes"].get("data_flops", 0) for m in manifests))


def budget_of(job: Job, data: Iterable[str] = ()) -> float:
    """FLOPs that a stage may spend: as many as another stage's training took (`flops_of`), or the rest of
    `flops` after its data; infinite if neither is set.

    Raises LimbeckError if the data alone took more.
    """
    stage: Budgeted = job.stage
    if stage.flops_of:
        return job.manifest(stage.flops_of)["flops"]
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
    """The first batches of a plan, one at least, whose training costs at most `budget` FLOPs."""
    if math.isinf(budget):
        return plan
    costs = []
    for batch in plan:
        lengths = [len(samples[i].tokens) for i in batch]
        costs.append(sum(n * config.flops_per_token(n / 2, backward=True) for n in lengths))
    count = int(np.searchsorted(np.cumsum(costs), budget, side="right"))
    return plan[: max(1, count)]


def forward_flops(samples: Iterable[Sample], config: ModelConfig) -> float:
    """FLOPs of one forward pass over samples, each token attending to half of its sequence on average."""
    return sum(len(sample.tokens) * config.flops_per_token(len(sample.tokens) / 2) for sample in samples)
