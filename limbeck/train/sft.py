"""Supervised learning: pretraining on documents and fine-tuning on responses are one loop over planned batches.

What the loss sees is the samples' affair: all of a document that can be foreseen, or a response, end-of-turn
included, and never its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..run_log import Record
from ..types import Sample, generator
from .batch import pack
from .checkpoint import Checkpoint
from .learner import Learner
from .losses import Loss, cross_entropy


def batches(samples: Sequence[Sample], tokens: int, seed: object) -> list[list[int]]:
    """Indices of samples in random order, cut into batches of about `tokens`. Lengths are left mixed:
    batches of like length are batches of like kind, and a model learns less from those."""
    order = generator(seed, "shuffle").permutation(len(samples))
    ends = np.cumsum([len(samples[i].tokens) for i in order])
    cuts = np.searchsorted(ends, np.arange(tokens, ends[-1], tokens), side="left") + 1
    return [piece.tolist() for piece in np.split(order, np.unique(cuts)) if len(piece)]


def plan_epochs(samples: Sequence[Sample], epochs: float, tokens: int, seed: object) -> list[list[int]]:
    """The batches of all epochs, each epoch in its own order; a part of an epoch is its start."""
    whole, part = divmod(epochs, 1)
    plans = [batches(samples, tokens, (seed, epoch)) for epoch in range(int(whole) + bool(part))]
    if part:
        plans[-1] = plans[-1][: max(1, round(part * len(plans[-1])))]
    return [batch for plan in plans for batch in plan]


def fit(
    learner: Learner, samples: Sequence[Sample], plan: list[list[int]], micro_tokens: int, log_every: int,
    record: Record, checkpoint: Checkpoint, loss: Loss = cross_entropy,
) -> None:  # fmt: skip
    """One update a batch, in the order of `plan`, from where the learner stands."""
    while learner.step < len(plan):
        step = learner.step
        batch = [samples[i] for i in plan[step]]
        metrics, tokens = (
            learner.update(pack(batch, micro_tokens), loss),
            sum(len(sample.tokens) for sample in batch),
        )
        if step % log_every == 0 or step == len(plan) - 1:
            record.step(step, metrics, tokens=tokens)
        else:
            record.beat(step, tokens)
        checkpoint.offer(lambda: {"learner": learner.state_dict()}, record)
