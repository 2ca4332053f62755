"""Samples to micro-batches: packed end to end, no padding, normalised over the whole batch.

N input tokens · M predicted tokens (those the loss sees) · S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.cache import Packed
from ..types import Group, Sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Input position `predict_M[i]` predicts `targets_M[i]` of sequence `rows_M[i]`.

    `tokens` and `sequences` count the *whole* batch that this is a piece of: a loss divides by them, so that
    the sum over micro-batches is the loss of the batch, however it was cut.
    """

    tokens_N: Tensor
    context: Packed
    predict_M: Tensor
    targets_M: Tensor
    rows_M: Tensor
    lengths_S: Tensor
    advantages_M: Tensor
    logprobs_M: Tensor | None
    reference_M: Tensor | None
    kept_MK: Tensor | None
    tokens: int
    sequences: int


def pack(samples: Sequence[Sample], batch_tokens: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Sort by length, cut into micro-batches of at most `batch_tokens` input tokens (one sequence at least)."""
    ordered = sorted((s for s in samples if len(s.tokens) > max(s.start, 1)), key=lambda s: len(s.tokens))
    predicted = sum(len(s.tokens) - max(s.start, 1) for s in ordered)
    pieces, piece, size = [], [], 0
    for sample in ordered:
        if piece and size + len(sample.tokens) - 1 > batch_tokens:
            pieces.append(piece)
            piece, size = [], 0
        piece.append(sample)
        size += len(sample.tokens) - 1
    return [_batch(piece, predicted, len(ordered), device) for piece in [*pieces, piece] if piece]


def _batch(samples: list[Sample], tokens: int, sequences: int, device: torch.device | str) -> Batch:
    starts = [max(s.start, 1) for s in samples]
    lengths = np.array([len(s.tokens) - 1 for s in samples])
    begins = np.concatenate([[0], lengths.cumsum()[:-1]])
    predict = [np.arange(b + s - 1, b + n) for b, s, n in zip(begins, starts, lengths, strict=True)]
    counts = np.array([len(p) for p in predict])

    def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(array, dtype=dtype, device=device)

    def joined(name: str) -> Tensor | None:
        values = [getattr(s, name) for s in samples]
        return None if values[0] is None else tensor(np.concatenate(values), torch.float32)

    return Batch(
        tokens_N=tensor(np.concatenate([s.tokens[:-1] for s in samples]), torch.long),
        context=Packed(lengths.tolist(), device=device),
        predict_M=tensor(np.concatenate(predict), torch.long),
        targets_M=tensor(np.concatenate([s.tokens[a:] for s, a in zip(samples, starts, strict=True)]), torch.long),
        rows_M=tensor(np.repeat(np.arange(len(samples)), counts), torch.long),
        lengths_S=tensor(counts, torch.float32),
        advantages_M=tensor(np.repeat([s.advantage for s in samples], counts), torch.float32),
        logprobs_M=joined("logprobs"),
        reference_M=joined("reference"),
        kept_MK=_kept(samples, device),
        tokens=tokens,
        sequences=sequences,
    )


def _kept(samples: list[Sample], device: torch.device | str) -> Tensor | None:
    """The ids that top-p left, padded with -1; None where nothing was cut off."""
    if any(s.kept is None for s in samples):
        return None
    rows = [ids for s in samples for ids in s.kept]
    table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(table).to(device)


def to_samples(groups: Sequence[Group], advantages: Sequence[Sequence[float]], keep_mask: bool) -> list[Sample]:
    """Scored groups and their advantages as samples. Tokens in are tokens out: nothing is re-tokenised."""
    return [
        Sample(
            tokens=np.concatenate([group.prompt_tokens, completion.tokens]),
            start=len(group.prompt_tokens),
            advantage=float(advantage),
            logprobs=completion.logprobs,
            kept=completion.kept if keep_mask else None,
        )
        for group, row in zip(groups, advantages, strict=True)
        for completion, advantage in zip(group.completions, row, strict=True)
    ]
