"""DPO: the policy at the beginning is the reference, and scores every pair once before the first update.

There is no reward model. The loss is `losses.DPO`, the loop `sft.SFTTrainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..types import Group, Sample
from .batch import by_sample, pack
from .scorer import Scorer

RankCompletions = Callable[[Group], Sequence[float]]  # one number per completion, the more the better


def to_pair(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, number: int) -> list[Sample]:
    """Token ids of a prompt and its two responses as two samples; `number` counts pairs from 1. Arrays are
    [tokens]."""
    start = len(prompt)
    return [
        Sample(np.concatenate([prompt, chosen]), start, pair=number),
        Sample(np.concatenate([prompt, rejected]), start, pair=-number),
    ]


def with_reference_logprobs(reference: Scorer, samples: Sequence[Sample], batch_tokens: int) -> list[Sample]:
    """The samples with the reference's log-probabilities of their tokens."""
    batches = pack(samples, batch_tokens)
    logprobs = by_sample(batches, reference.logprobs(batches), len(samples))
    return [
        replace(sample, reference=reference_M) for sample, reference_M in zip(samples, logprobs, strict=True)
    ]


def mean_logprob(teacher: Scorer, batch_tokens: int) -> RankCompletions:
    """Rank completions by the mean log-probability per token that a teacher gives them."""

    def rank(group: Group) -> list[float]:
        """The mean log-probability of each completion."""
        start = len(group.prompt_tokens)
        samples = [
            Sample(np.concatenate([group.prompt_tokens, completion.tokens]), start)
            for completion in group.completions
        ]
        batches = pack(samples, batch_tokens)
        logprobs = by_sample(batches, teacher.logprobs(batches), len(samples))
        return [float(logprobs_M.mean()) for logprobs_M in logprobs]

    return rank
