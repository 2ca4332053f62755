"""Samples to micro-batches: packed end to end, prompts once, normalised over the whole batch.

N input tokens · M predicted tokens (those the loss sees) · S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.packed import LONG, Packed, SharedPrefix
from ..types import Group, Sample
from .divergence import States, TopK

MICRO_TOKENS = 8192  # of a model that only reads


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Input position `predict_M[i]` predicts `targets_M[i]` of sequence `rows_M[i]`; `next_N`
    is the token that follows each input token, `routes_NLK` the experts that it meets where they are settled.

    `order_S` tells each sequence's place among the samples that were packed, `pairs_S` numbers pairs from 1, the worse half negative; `teacher` is whom the predictions are compared with.
    `tokens` and `sequences` count the *whole* batch that this is a piece of: a loss divides by them, so that
    the sum over micro-batches is the loss of the batch, however it was cut.
    """

    tokens_N: Tensor
    context: Packed | SharedPrefix
    predict_M: Tensor
    targets_M: Tensor
    rows_M: Tensor
    lengths_S: Tensor
    advantages_M: Tensor
    logprobs_M: Tensor | None
    reference_M: Tensor | None
    kept_MK: Tensor | None
    next_N: Tensor
    routes_NLK: Tensor | None
    tokens: int
    sequences: int
    order_S: np.ndarray
    pairs_S: Tensor | None = None
    spans_M: Tensor | None = None
    teacher: States | TopK | None = None


def pack(samples: Sequence[Sample], batch_tokens: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Cut into micro-batches of at most `batch_tokens` input tokens (one sequence or group at least), like
    lengths together. Samples of one prompt stand together, and their prompt once: a pair is never parted."""
    learned = [s for s in samples if _targets(s).size]
    predicted = sum(_targets(s).size for s in learned)
    groups = sorted(_by_prompt(learned), key=lambda g: (_family(g), len(g[0].tokens)))
    pieces: list[list[list[Sample]]] = []
    size = 0
    for group in groups:
        cost = _cost(group)
        if pieces and size + cost <= batch_tokens and _family(pieces[-1][0]) == _family(group):
            pieces[-1].append(group)
            size += cost
        else:
            pieces.append([group])
            size = cost
    places = {id(sample): place for place, sample in enumerate(samples)}
    return [
        _batch(*(_branched if _family(piece[0]) else _packed)(piece), places, predicted, len(learned), device)
        for piece in pieces
    ]


def by_sample(batches: Sequence[Batch], values_M: Sequence[Tensor], count: int) -> list[np.ndarray]:
    """What was computed for each prediction, back in the order of the `count` samples that were packed; of a sample
    without a prediction, nothing."""
    found = [np.zeros((0, *values_M[0].shape[1:]), np.float32)] * count
    for batch, values in zip(batches, values_M, strict=True):
        parts = np.split(values.numpy(), batch.lengths_S.long().cumsum(0)[:-1].numpy())
        for place, part in zip(batch.order_S, parts, strict=True):
            found[place] = part
    return found


def _targets(sample: Sample) -> np.ndarray:
    """The tokens that the loss sees."""
    targets = sample.tokens[max(sample.start, 1) :]
    return targets if sample.learned is None else targets[sample.learned]


def _by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that begin with the same prompt, together; one without a prompt is alone, and so is one so long that
    its prompt is the least of it."""
    groups: dict[object, list[Sample]] = {}
    for i, sample in enumerate(samples):
        shares = (sample.start > 1 and len(sample.tokens) <= LONG) or (sample.pair and sample.start)
        prompt = sample.tokens[: sample.start].tobytes() if shares else i
        groups.setdefault(prompt, []).append(sample)
    return list(groups.values())


def _cost(group: list[Sample]) -> int:
    """Input tokens of a group: the prompt once, and of each completion all but its last token."""
    return (
        group[0].start + sum(len(s.tokens) - max(s.start, 1) - 1 for s in group)
        if len(group) > 1
        else len(group[0].tokens) - 1
    )


def _family(group: list[Sample]) -> int:
    """Length in tokens of the prompt that a group shares (at least 1), or 0 where it shares none. A micro-batch holds groups of
    one such length only."""
    return max(group[0].start, 1) if len(group) > 1 else 0


Piece = tuple[Sample, int, int]  # a sample's tokens from here to there
Layout = tuple[list[Sample], list[Piece], "Packed | SharedPrefix", list[np.ndarray]]


def _packed(groups: list[list[Sample]]) -> Layout:
    """Whole sequences end to end: samples, input pieces, context, and the positions that predict."""
    samples = [group[0] for group in groups]
    lengths = [len(s.tokens) - 1 for s in samples]
    begins = np.cumsum([0, *lengths[:-1]])
    predict = [
        np.arange(b + max(s.start, 1) - 1, b + n) for b, s, n in zip(begins, samples, lengths, strict=True)
    ]
    return samples, [(s, 0, n) for s, n in zip(samples, lengths, strict=True)], Packed(lengths), predict


def _branched(groups: list[list[Sample]]) -> Layout:
    """Prompts first, then completions by length. A completion's first token is predicted by its prompt's last."""
    width = _family(groups[0])
    rows = sorted(
        ((g, s) for g, group in enumerate(groups) for s in group), key=lambda row: len(row[1].tokens)
    )
    owners, samples = [g for g, _ in rows], [s for _, s in rows]
    lengths = [len(s.tokens) - width - 1 for s in samples]
    begins = len(groups) * width + np.cumsum([0, *lengths[:-1]])
    predict = [np.r_[(g + 1) * width - 1, b : b + n] for g, b, n in zip(owners, begins, lengths, strict=True)]
    pieces = [(group[0], 0, width) for group in groups] + [(s, width, len(s.tokens) - 1) for s in samples]
    return samples, pieces, SharedPrefix(len(groups), width, owners, lengths), predict


def _batch(
    samples: list[Sample], pieces: list[Piece], context: Packed | SharedPrefix, predict: list[np.ndarray],
    places: dict[int, int], tokens: int, sequences: int, device: torch.device | str,
) -> Batch:  # fmt: skip
    predict = [p if s.learned is None else p[s.learned] for p, s in zip(predict, samples, strict=True)]
    counts = np.array([len(p) for p in predict])

    def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(array, dtype=dtype, device=device)

    def joined(name: str) -> Tensor | None:
        values = [getattr(s, name) for s in samples]
        return None if values[0] is None else tensor(np.concatenate(values), torch.float32)

    routed = all(s.routes is not None for s in samples)
    return Batch(
        tokens_N=tensor(np.concatenate([s.tokens[a:b] for s, a, b in pieces]), torch.long),
        context=context,
        predict_M=tensor(np.concatenate(predict), torch.long),
        targets_M=tensor(np.concatenate([_targets(s) for s in samples]), torch.long),
        rows_M=tensor(np.repeat(np.arange(len(samples)), counts), torch.long),
        lengths_S=tensor(counts, torch.float32),
        advantages_M=tensor(np.repeat([s.advantage for s in samples], counts), torch.float32),
        logprobs_M=joined("logprobs"),
        reference_M=joined("reference"),
        kept_MK=_kept(samples, device),
        next_N=tensor(np.concatenate([s.tokens[a + 1 : b + 1] for s, a, b in pieces]), torch.long),
        routes_NLK=tensor(np.concatenate([s.routes[a:b] for s, a, b in pieces]), torch.long)
        if routed
        else None,
        tokens=tokens,
        sequences=sequences,
        order_S=np.array([places[id(s)] for s in samples]),
        pairs_S=tensor(np.array([s.pair for s in samples]), torch.long) if samples[0].pair else None,
        spans_M=None
        if samples[0].spans is None
        else tensor(_numbered([s.spans for s in samples]), torch.long),
        teacher=_labels(samples, tensor),
    )


def _numbered(spans: list[np.ndarray]) -> np.ndarray:
    """Spans of many samples, no number twice."""
    begins = np.cumsum([0, *(one.max() + 1 for one in spans[:-1])])
    return np.concatenate(
        [np.where(one < 0, -1, one + begin) for one, begin in zip(spans, begins, strict=True)]
    )


def _labels(samples: list[Sample], tensor: Callable[[np.ndarray, torch.dtype], Tensor]) -> TopK | None:
    """What a teacher said before, where all samples have it."""
    if any(s.labels is None for s in samples):
        return None
    ids, logprobs, tail = (
        np.concatenate([getattr(s.labels, name) for s in samples]) for name in ("ids", "logprobs", "tail")
    )
    return TopK(tensor(ids, torch.long), tensor(logprobs, torch.float32), tensor(tail, torch.float32))


def _kept(samples: list[Sample], device: torch.device | str) -> Tensor | None:
    """The ids that top-p left, padded with -1; None where nothing was cut off."""
    if any(s.kept is None for s in samples):
        return None
    rows = [ids for s in samples for ids in s.kept]
    table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(table).to(device)


def to_samples(
    groups: Sequence[Group], advantages: Sequence[Sequence[float]], keep_mask: bool
) -> list[Sample]:
    """Scored groups and their advantages as samples. Tokens in are tokens out: nothing is re-tokenised."""
    return [
        Sample(
            tokens=np.concatenate([group.prompt_tokens, completion.tokens]),
            start=len(group.prompt_tokens),
            advantage=float(advantage),
            logprobs=completion.logprobs,
            kept=completion.kept if keep_mask else None,
            routes=completion.routes,
        )
        for group, row in zip(groups, advantages, strict=True)
        for completion, advantage in zip(group.completions, row, strict=True)
    ]
