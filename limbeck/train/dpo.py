"""DPO (direct preference optimisation). The reference is the model as it is at the beginning of the stage;
it scores every pair once, before the first update.

There is no reward model. The loss is `losses.DPO`, the training loop is `sft.SFTTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..types import Group, Sample
from .batch import by_sample, pack
from .scorer import Scorer

RankCompletions = Callable[[Group], Sequence[float]]  # one number per completion, the more the better


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
    batches = pack(samples, batch_tokens)
    logprobs = by_sample(batches, reference.logprobs(batches), len(samples))
    return [
        replace(sample, reference=reference_M) for sample, reference_M in zip(samples, logprobs, strict=True)
    ]


def mean_logprob(teacher: Scorer, batch_tokens: int) -> RankCompletions:
    """Return a function that ranks the completions of a group by the mean log-probability per token that a
    teacher gives them. `batch_tokens` is the size of a micro-batch in input tokens."""

    def rank(group: Group) -> list[float]:
        """Return the mean log-probability per token of each completion of a group."""
        start = len(group.prompt_tokens)
        samples = [
            Sample(np.concatenate([group.prompt_tokens, completion.tokens]), start)
            for completion in group.completions
        ]
        batches = pack(samples, batch_tokens)
        logprobs = by_sample(batches, teacher.logprobs(batches), len(samples))
        return [float(logprobs_M.mean()) for logprobs_M in logprobs]

    return rank
