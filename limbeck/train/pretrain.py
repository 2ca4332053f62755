"""Pretraining: next-token loss on documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..recipe import Pretrain
from ..record import Record
from ..types import Sample, generator
from .batch import pack
from .checkpoint import Checkpoint
from .learner import Learner
from .losses import cross_entropy


def batches(documents: Sequence[Sample], tokens: int, seed: object) -> list[list[int]]:
    """Indices of documents in random order, cut into batches of about `tokens`. Lengths are left mixed:
    batches of like length are batches of like kind, and a model learns less from those."""
    order = generator(seed, "shuffle").permutation(len(documents))
    ends = np.cumsum([len(documents[i].tokens) for i in order])
    cuts = np.searchsorted(ends, np.arange(tokens, ends[-1], tokens), side="left") + 1
    return [piece.tolist() for piece in np.split(order, np.unique(cuts)) if len(piece)]


def pretrain(
    learner: Learner, documents: Sequence[Sample], plan: list[list[int]], settings: Pretrain,
    record: Record, checkpoint: Checkpoint,
) -> None:  # fmt: skip
    """One pass over the documents in the order of `plan`."""
    while learner.step < len(plan):
        step = learner.step
        metrics = learner.update(pack([documents[i] for i in plan[step]], 4 * settings.batch_tokens), cross_entropy)
        if step % settings.log_every == 0 or step == len(plan) - 1:
            record.step(step, metrics)
        checkpoint.offer(lambda: {"learner": learner.state_dict()}, record)
