"""Preferences: pairs of responses to one prompt, and how a plan of pairs is learned.

What this is not: there is no reward model. The reference is the student at the beginning, and has spoken once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..types import Group, Sample
from .batch import by_sample, pack
from .learner import Learner
from .sft import plan_epochs

Scorer = Callable[[Group], Sequence[float]]  # one number for each completion, the more the better


def best_and_worst(scores: Sequence[float], margin: float) -> tuple[int, int] | None:
    """The places of the best and of the worst, of equals the first; None if they differ by no more than `margin`.

    >>> best_and_worst([0.2, 1.2, 0.0, 1.2], margin=0.0)
    (1, 2)
    """
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    return (best, worst) if scores[best] - scores[worst] > margin else None


def to_pair(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, number: int) -> list[Sample]:
    """Two samples that know of each other; `number` counts pairs from 1."""
    halves = (chosen, number), (rejected, -number)
    return [Sample(np.concatenate([prompt, response]), len(prompt), pair=sign) for response, sign in halves]


def referenced(reference: Learner, samples: Sequence[Sample], batch_tokens: int) -> list[Sample]:
    """The samples with what `reference` thinks of them."""
    batches = pack(samples, batch_tokens)
    scored = by_sample(batches, reference.logprobs(batches), len(samples))
    return [replace(sample, reference=logprobs) for sample, logprobs in zip(samples, scored, strict=True)]


def plan_pairs(samples: Sequence[Sample], epochs: float, tokens: int, seed: object) -> list[list[int]]:
    """Batches of whole pairs: a pair is drawn, and both its halves come. Halves stand side by side in `samples`."""
    whole = [
        Sample(np.concatenate([samples[i].tokens, samples[i + 1].tokens]), 0)
        for i in range(0, len(samples), 2)
    ]
    return [
        [i for pair in batch for i in (2 * pair, 2 * pair + 1)]
        for batch in plan_epochs(whole, epochs, tokens, seed)
    ]


def likelihood(teacher: Learner, batch_tokens: int) -> Scorer:
    """A teacher as judge: the mean log-probability that it gives to a completion's tokens."""

    def score(group: Group) -> list[float]:
        samples = [
            Sample(np.concatenate([group.prompt_tokens, c.tokens]), len(group.prompt_tokens))
            for c in group.completions
        ]
        batches = pack(samples, batch_tokens)
        return [
            float(logprobs.mean()) for logprobs in by_sample(batches, teacher.logprobs(batches), len(samples))
        ]

    return score
