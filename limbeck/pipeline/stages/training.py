"""What learning stages have in common: a plan that a budget pays for, its execution, the model on disk, the bill."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...config.parts import Budgeted
from ...config.recipe import DPO, SFT, Pretrain
from ...model import weights
from ...model.config import ModelConfig
from ...model.decoder import Decoder
from ...text.tokenizer import Tokenizer
from ...train.learner import Learner
from ...train.losses import Loss, cross_entropy
from ...train.sft import fit
from ...types import LimbeckError, Sample
from ..job import Job


def fit_samples(
    job: Job, decoder: Decoder, tokenizer: Tokenizer, samples: list[Sample], plan: list[list[int]], micro_tokens: int,
    loss: Loss = cross_entropy,
) -> dict[str, Any]:  # fmt: skip
    """What every supervised stage does: learn by plan, from the last checkpoint on; save the model; count."""
    stage: Pretrain | SFT | DPO = job.stage
    recompute = getattr(stage, "recompute", False)
    learner, checkpoint = Learner(decoder, stage.optimizer, len(plan), recompute), job.checkpoint()
    if state := checkpoint.restore():
        learner.load_state_dict(state["learner"])
    fit(
        learner,
        samples,
        plan,
        micro_tokens,
        stage.log_every,
        job.record(learner.step, len(plan)),
        checkpoint,
        loss,
    )
    save_model(decoder, tokenizer, job.folder)
    lengths = [len(samples[i].tokens) for batch in plan for i in batch]
    tokens = sum(lengths)
    flops = tokens * decoder.config.flops_per_token(tokens / len(lengths) / 2, backward=True)
    return {"tokens": tokens, "flops": flops, "notes": {"parameters": decoder.config.parameters}}


def data_flops(job: Job, names: Iterable[str]) -> float:
    """What the rows of these stages cost, a teacher's sampling and reading included, back to where they began."""
    manifests = [job.manifest(name) for name in names]
    return float(sum(m["flops"] + m["notes"].get("data_flops", 0) for m in manifests))


def budget_of(job: Job, data: Iterable[str] = ()) -> float:
    """FLOPs that a stage may spend: as many as another's learning took, or what its rows have left of a sum."""
    stage: Budgeted = job.stage
    if stage.flops_of:
        return job.manifest(stage.flops_of)["flops"]
    if not stage.flops:
        return math.inf
    taken = data_flops(job, data)
    if taken >= stage.flops:
        raise LimbeckError(
            f"stages.{job.name}.flops: its rows alone took {taken:.3g} of {stage.flops:.3g}; allow more, or sample less"
        )
    return stage.flops - taken


def affordable(
    plan: list[list[int]], samples: list[Sample], config: ModelConfig, budget: float
) -> list[list[int]]:
    """The batches of a plan that a budget pays for: one at least."""
    if math.isinf(budget):
        return plan
    lengths = [[len(samples[i].tokens) for i in batch] for batch in plan]
    costs = [sum(n * config.flops_per_token(n / 2, backward=True) for n in batch) for batch in lengths]
    return plan[: max(1, int(np.searchsorted(np.cumsum(costs), budget, side="right")))]


def save_model(decoder: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    directory = folder / "model"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    weights.save(decoder, directory, tokenizer)
    tokenizer.save(directory)
