"""Supervised learning: one training loop over planned batches. Pretraining on documents, SFT on responses,
and DPO and reward models on pairs use it with different samples and different losses.

The samples say which tokens are in the loss: all tokens of a document but the first, or a response with its
end-of-turn token and never its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..run_log import RunLog
from ..types import Sample, generator
from .checkpoint import Checkpoint
from .learner import Learner
from .losses import CrossEntropy, Loss

Plan = Sequence[Sequence[int]]  # indices of samples, batch by batch


def batches(samples: Sequence[Sample], tokens: int, seed: object) -> list[list[int]]:
    """Shuffle the samples and divide them into batches of about `tokens` tokens; return the sample indices
    of each batch.

    Samples are not sorted by length: samples of similar length are of a similar kind, and a model learns
    less from batches that are all of one kind."""
    order = generator(seed, "shuffle").permutation(len(samples))
    ends = np.cumsum([len(samples[i].tokens) for i in order])
    cuts = np.searchsorted(ends, np.arange(tokens, ends[-1], tokens), side="left") + 1
    return [part.tolist() for part in np.split(order, np.unique(cuts)) if len(part)]


def plan_epochs(samples: Sequence[Sample], epochs: float, tokens: int, seed: object) -> list[list[int]]:
    """Plan the batches of all epochs; return the sample indices of each batch. Each epoch has its own random
    order; a fraction of an epoch is its first batches."""
    whole, part = divmod(epochs, 1)
    plans = [batches(samples, tokens, (seed, epoch)) for epoch in range(int(whole) + bool(part))]
    if part:
        plans[-1] = plans[-1][: max(1, round(part * len(plans[-1])))]
    return [batch for plan in plans for batch in plan]


@dataclass(frozen=True)
class SFTTrainer:
    """Trains a learner with one update for each batch of `plan`, a list of sample indices per batch; begins
    at the learner's `step`.

    `micro_tokens` is the size of a micro-batch in input tokens. Metrics are logged every `log_every` steps
    and after the last step; metrics named in `unlogged` are left out."""

    learner: Learner
    samples: Sequence[Sample]
    plan: Plan
    micro_tokens: int
    log_every: int
    loss: Loss = field(default_factory=CrossEntropy)
    unlogged: frozenset[str] = frozenset()

    def train(self, log: RunLog, checkpoint: Checkpoint) -> None:
        """Run the remaining steps, and write their metrics to `log`."""
        while self.learner.step < len(self.plan):
            step = self.learner.step
            batch = [self.samples[i] for i in self.plan[step]]
            tokens = sum(len(sample.tokens) for sample in batch)
            metrics = self.learner.update(self.learner.pack(batch, self.micro_tokens), self.loss)
            if step % self.log_every == 0 or step == len(self.plan) - 1:
                logged = {name: value for name, value in metrics.items() if name not in self.unlogged}
                log.step(step, logged, tokens=tokens)
            else:
                log.beat(step, tokens)
            checkpoint.offer(self.state_dict, log)

    def state_dict(self) -> dict:
        """Return the state that an exact resume needs."""
        return {"learner": self.learner.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state that `state_dict` returned, so that training continues from it."""
        self.learner.load_state_dict(state["learner"])
