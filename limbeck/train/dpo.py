"""DPO (direct preference optimisation). The reference is the model as it is at the beginning of the stage;
it scores every pair once, before the first update.

There is no reward model. The loss is `DPO`, the training loop is `sft.SFTTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..types import Sample
from .batch import Batch, by_sample
from .losses import Metrics
from .pairs import pair_margins
from .scorer import Scorer


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): -log sigmoid(reward of chosen - reward of
    rejected).

    The implicit reward of a response is beta times the sum of log(pi / reference) over its tokens, where pi
    is the probability that the trained model gives a token and reference that of the frozen initial model.
    With `normalized`, the mean over the tokens replaces the sum."""

    beta: float
    normalized: bool = False

    def __call__(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss and metrics of a micro-batch that holds both responses of every pair
        (`batch.pairs_S`), from the log-probabilities [M]."""
        log_ratio_M = logprobs_M - batch.reference_M
        reward_S = logprobs_M.new_zeros(len(batch.lengths_S)).index_add(0, batch.rows_M, log_ratio_M)
        if self.normalized:
            reward_S = reward_S / batch.lengths_S
        reward_S = self.beta * reward_S
        margin_P = pair_margins(reward_S, batch.pairs_S)
        pairs = batch.sequences / 2
        loss = -F.logsigmoid(margin_P).sum() / pairs
        chosen_S = batch.pairs_S > 0
        metrics = {
            "loss": loss,
            "margin": margin_P.sum() / pairs,
            "preferred": (margin_P > 0).float().sum() / pairs,
            "chosen": reward_S[chosen_S].sum() / pairs,
            "rejected": reward_S[~chosen_S].sum() / pairs,
        }
        return loss, {name: metric.detach() for name, metric in metrics.items()}


def to_pair(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, number: int) -> list[Sample]:
    """Return the two samples, chosen and rejected, of a preference pair. `prompt`, `chosen` and `rejected`
    are arrays of token ids [tokens]; `number` is the number of the pair, from 1."""
    start = len(prompt)
    return [
        Sample(np.concatenate([prompt, chosen]), start, pair=number),
        Sample(np.concatenate([prompt, rejected]), start, pair=-number),
    ]


def with_reference_logprobs(reference: Scorer, samples: Sequence[Sample], batch_tokens: int) -> list[Sample]:
    """Return copies of the samples that also hold the reference model's log-probability of each token in the
    loss. `batch_tokens` is the size of a micro-batch in input tokens."""
    batches = reference.pack(samples, batch_tokens)
    logprobs = by_sample(batches, reference.logprobs(batches), len(samples))
    return [
        replace(sample, reference=reference_M) for sample, reference_M in zip(samples, logprobs, strict=True)
    ]
