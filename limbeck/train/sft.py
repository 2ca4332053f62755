"""Supervised fine-tuning: the loss sees responses, end-of-turn included, and never the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from ..recipe import SFT
from ..record import Record
from ..types import Sample
from .batch import pack
from .checkpoint import Checkpoint
from .learner import Learner
from .losses import cross_entropy
from .pretrain import batches


def plan_epochs(samples: Sequence[Sample], settings: SFT, seed: object) -> list[list[int]]:
    """Batches of sample indices for all epochs, each epoch in its own order; a part of an epoch is its start."""
    whole, part = divmod(settings.epochs, 1)
    epochs = [batches(samples, settings.batch_tokens, (seed, epoch)) for epoch in range(int(whole) + bool(part))]
    if part:
        epochs[-1] = epochs[-1][: max(1, round(part * len(epochs[-1])))]
    return [batch for epoch in epochs for batch in epoch]


def finetune(
    learner: Learner, samples: Sequence[Sample], plan: list[list[int]], settings: SFT,
    record: Record, checkpoint: Checkpoint,
) -> None:  # fmt: skip
    """Train on `samples` in the order of `plan`, one update a batch."""
    while learner.step < len(plan):
        step = learner.step
        chosen = [samples[i] for i in plan[step]]
        metrics = learner.update(pack(chosen, settings.batch_tokens), cross_entropy)
        if step % settings.log_every == 0 or step == len(plan) - 1:
            record.step(step, metrics)
        checkpoint.offer(lambda: {"learner": learner.state_dict()}, record)
