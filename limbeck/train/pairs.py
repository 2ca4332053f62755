"""Preference pairs: a chosen and a rejected response to one prompt, as two samples that are always in the
same batch.

DPO and reward models use the same encoding. `Sample.pair` is i for the chosen and -i for the rejected
response of the i-th pair, counted from 1, and the two samples are neighbours in the list."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..types import Sample, generator
from .sft import plan_epochs


def best_and_worst(scores: Sequence[float], margin: float) -> tuple[int, int] | None:
    """Return the indices of the best and of the worst score, the first one among equals; None if the two
    differ by no more than `margin`.

    >>> best_and_worst([0.2, 1.2, 0.0, 1.2], margin=0.0)
    (1, 2)
    """
    best = int(np.argmax(scores))
    worst = int(np.argmin(scores))
    return (best, worst) if scores[best] - scores[worst] > margin else None


def both(pairs: Sequence[int]) -> list[int]:
    """Return the indices of the samples of some pairs. Pair p, counted from 0, has the samples 2p (chosen)
    and 2p + 1 (rejected).

    >>> both([3, 0])
    [6, 7, 0, 1]
    """
    return [half for pair in pairs for half in (2 * pair, 2 * pair + 1)]


def plan_by_tokens(samples: Sequence[Sample], epochs: float, tokens: int, seed: object) -> list[list[int]]:
    """Plan batches of whole pairs with about `tokens` tokens each; return the sample indices of each batch.
    Each epoch has its own random order."""
    joined = [
        Sample(np.concatenate([chosen.tokens, rejected.tokens]), 0)
        for chosen, rejected in zip(samples[::2], samples[1::2], strict=True)
    ]
    return [both(batch) for batch in plan_epochs(joined, epochs, tokens, seed)]


def plan_by_count(count: int, epochs: float, batch: int, seed: object) -> list[list[int]]:
    """Plan batches of `batch` pairs out of `count`; return the sample indices of each batch.

    Each epoch has its own random order and is divided into batches separately, so no batch has a pair twice.
    A fraction of an epoch is the first part of its order."""
    plan = []
    left = max(1, round(epochs * count))
    for epoch in range(int(np.ceil(epochs))):
        order = generator(seed, "pairs", epoch).permutation(count)[:left]
        plan += [both(order[i : i + batch].tolist()) for i in range(0, len(order), batch)]
        left -= len(order)
    return plan


def pair_margins(reward_S: Tensor, pairs_S: Tensor) -> Tensor:
    """Return, for each pair [P], the reward of the chosen response minus the reward of the rejected one.

    `pairs_S` is the number of each sequence's pair, negative for the rejected response. Raises ValueError if
    a pair lacks one of its two responses, or has one twice."""
    _, pair_S, count_P = pairs_S.abs().unique(return_inverse=True, return_counts=True)
    balance_P = torch.zeros_like(count_P).index_add(0, pair_S, pairs_S.sign())
    if int((count_P != 2).sum()) or int(balance_P.abs().sum()):
        raise ValueError("a pair is not whole: its halves need one prompt, and each a token to learn")
    return reward_S.new_zeros(len(count_P)).index_add(0, pair_S, reward_S * pairs_S.sign())
