"""Pack samples into micro-batches: sequences are laid end to end, and a prompt that several samples share is
computed once.

A sample is one token sequence to learn from (`types.Sample`). A prediction is a token that is in the loss.
Losses are normalised by counts of the whole batch, not of the micro-batch.

Dimensions: N input tokens · M predictions · S sequences · L mixture-of-experts layers · K token ids (in
`kept_MK`) or chosen experts (in `routes_NLK`) of a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model.packed import LONG, Packed, SharedPrefix
from ..types import Group, Sample
from .divergence import States, TopK

MICRO_TOKENS = 8192  # tokens of a micro-batch in a forward pass without gradients
FLOATS = ("lengths_S", "advantages_M", "logprobs_M", "reference_M")  # other tensors of a batch are int64
Device = torch.device | str


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed sequences.

    The hidden state at input position `predict_M[i]` predicts the token `targets_M[i]`, which belongs to
    sequence `rows_M[i]` of the micro-batch. `lengths_S` is the number of predictions of each sequence.
    `logprobs_M` are the log-probabilities at sampling, `reference_M` those of a reference model or a
    teacher. `next_N` is the token after each input token, `routes_NLK` the experts chosen at sampling, to be
    used again, and `kept_MK` the token ids that top-p sampling left to choose from, padded with -1.
    `order_S` is the index of each sequence in the list of samples that was packed. `pairs_S` is the number
    of the preference pair of each sequence, from 1, negative for the rejected response. `spans_M` is the
    number of the text span that each prediction is in, from 0, or -1 for none. `teacher` gives the teacher's
    distribution at the predictions.

    `tokens` and `sequences` count the predictions and sequences of the *whole* batch of which this is one
    part. A loss divides by them, so the sum of the losses of all micro-batches is the loss of the batch,
    however it was cut."""

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


def pack(samples: Sequence[Sample], batch_tokens: int, device: Device = "cpu") -> list[Batch]:
    """Pack samples into micro-batches of at most `batch_tokens` input tokens, sequences of similar length
    together.

    Samples with the same prompt form a group, for which the prompt is computed once. A group is never
    divided, so a group of more than `batch_tokens` tokens is a micro-batch of its own. The two responses of
    a preference pair are always in one micro-batch. A sample without any token in the loss is left out."""
    learned = [sample for sample in samples if _targets(sample).size]
    places = {id(sample): place for place, sample in enumerate(samples)}
    tokens = sum(_targets(sample).size for sample in learned)
    batches = []
    for groups in _cut(_grouped(learned), batch_tokens):
        layout = _shared_prompts(groups, device) if _prompt_length(groups[0]) else _end_to_end(groups, device)
        order_S = np.array([places[id(sample)] for sample in layout.samples])
        batches.append(_batch(layout, order_S, tokens, len(learned), device))
    return batches


def _cut(groups: list[list[Sample]], batch_tokens: int) -> list[list[list[Sample]]]:
    """Sort groups by prompt length and sequence length, and cut them into micro-batches of at most
    `batch_tokens` input tokens. All groups of a micro-batch have the same prompt length."""
    groups = sorted(groups, key=lambda group: (_prompt_length(group), len(group[0].tokens)))
    micro_batches: list[list[list[Sample]]] = []
    size = 0
    for group in groups:
        cost = _cost(group)
        fits = micro_batches and size + cost <= batch_tokens
        if fits and _prompt_length(micro_batches[-1][0]) == _prompt_length(group):
            micro_batches[-1].append(group)
            size += cost
        else:
            micro_batches.append([group])
            size = cost
    return micro_batches


def by_sample(batches: Sequence[Batch], values_M: Sequence[Tensor], count: int) -> list[np.ndarray]:
    """Return the values of the predictions of each sample, in the order in which the `count` samples were
    packed.

    `values_M` has one tensor [M, ...] for each micro-batch. The result has one array [predictions, ...] for
    each sample; it is empty for a sample without a prediction."""
    values_of = [np.zeros((0, *values_M[0].shape[1:]), np.float32)] * count
    for batch, values in zip(batches, values_M, strict=True):
        ends = batch.lengths_S.long().cumsum(0)[:-1].cpu().numpy()
        for place, part in zip(batch.order_S, np.split(values.cpu().numpy(), ends), strict=True):
            values_of[place] = part
    return values_of


def _targets(sample: Sample) -> np.ndarray:
    """Return the ids of the tokens of a sample that are in the loss."""
    targets = sample.tokens[max(sample.start, 1) :]
    return targets if sample.learned is None else targets[sample.learned]


def _grouped(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Group the samples that have the same prompt, and the two responses of each preference pair.

    A sample without a prompt is a group of its own. So is a sample of more than `LONG` tokens, unless it
    belongs to a preference pair: sharing its prompt would save little."""
    groups: dict[object, list[Sample]] = {}
    for i, sample in enumerate(samples):
        key: object = i
        if sample.start > 1 and (sample.pair or len(sample.tokens) <= LONG):
            key = sample.tokens[: sample.start].tobytes()
        elif sample.pair:
            key = ("pair", abs(sample.pair))
        groups.setdefault(key, []).append(sample)
    return list(groups.values())


def _prompt_length(group: list[Sample]) -> int:
    """Return the number of prompt tokens that the samples of a group share; 0 if they share none."""
    return group[0].start if len(group) > 1 and group[0].start > 1 else 0


def _cost(group: list[Sample]) -> int:
    """Return the number of input tokens of a group: a shared prompt counts once, and the last token of each
    completion is never an input."""
    prompt = _prompt_length(group)
    return prompt + sum(len(sample.tokens) - prompt - 1 for sample in group)


class Segment(NamedTuple):
    """The part of a sample that is one run of input tokens: `sample.tokens[begin:end]`."""

    sample: Sample
    begin: int
    end: int


class Layout(NamedTuple):
    """The order in which a micro-batch is computed.

    `samples` are its samples in order, `segments` the runs of tokens that make up its input, `context` says
    which tokens attend to which, and `predict` has, for each sample, the input positions that predict its
    tokens."""

    samples: list[Sample]
    segments: list[Segment]
    context: Packed | SharedPrefix
    predict: list[np.ndarray]


def _end_to_end(groups: list[list[Sample]], device: Device) -> Layout:
    """Lay out whole sequences, each with its own prompt, one after the other."""
    samples = [sample for group in groups for sample in group]
    lengths = [len(sample.tokens) - 1 for sample in samples]
    begins = np.cumsum([0, *lengths[:-1]])
    predict = [
        np.arange(begin + max(sample.start, 1) - 1, begin + length)
        for begin, sample, length in zip(begins, samples, lengths, strict=True)
    ]
    segments = [Segment(sample, 0, length) for sample, length in zip(samples, lengths, strict=True)]
    return Layout(samples, segments, Packed(lengths, device=device), predict)


def _shared_prompts(groups: list[list[Sample]], device: Device) -> Layout:
    """Lay out all shared prompts first, then all completions in order of length. The last token of a prompt
    predicts the first token of each completion of that prompt."""
    width = _prompt_length(groups[0])
    rows = [(owner, sample) for owner, group in enumerate(groups) for sample in group]
    rows.sort(key=lambda row: len(row[1].tokens))
    owners = [owner for owner, _ in rows]
    samples = [sample for _, sample in rows]
    lengths = [len(sample.tokens) - width - 1 for sample in samples]
    begins = len(groups) * width + np.cumsum([0, *lengths[:-1]])
    predict = [
        np.r_[(owner + 1) * width - 1, begin : begin + length]
        for owner, begin, length in zip(owners, begins, lengths, strict=True)
    ]
    segments = [Segment(group[0], 0, width) for group in groups]
    segments += [Segment(sample, width, len(sample.tokens) - 1) for sample in samples]
    return Layout(
        samples, segments, SharedPrefix(len(groups), width, owners, lengths, device=device), predict
    )


def _batch(layout: Layout, order_S: np.ndarray, tokens: int, sequences: int, device: Device) -> Batch:
    """Make the tensors of a micro-batch. `order_S` is the index of each sequence among the packed samples;
    `tokens` and `sequences` are the counts of predictions and sequences of the whole batch."""
    tensors = {}
    for name, array in _arrays(layout).items():
        dtype = torch.float32 if name in FLOATS else torch.long
        tensors[name] = None if array is None else torch.as_tensor(array, dtype=dtype, device=device)
    return Batch(
        **tensors,
        context=layout.context,
        tokens=tokens,
        sequences=sequences,
        order_S=order_S,
        teacher=_labels(layout.samples, device),
    )


def _arrays(layout: Layout) -> dict[str, np.ndarray | None]:
    """Return the arrays of a micro-batch by the names of the fields of `Batch`; None for a field that the
    samples do not have."""
    samples = layout.samples
    segments = layout.segments
    predict = []
    for positions, sample in zip(layout.predict, samples, strict=True):
        predict.append(positions if sample.learned is None else positions[sample.learned])
    counts = np.array([len(positions) for positions in predict])
    advantages = [sample.advantage for sample in samples]
    targets = [_targets(sample) for sample in samples]
    inputs = [segment.sample.tokens[segment.begin : segment.end] for segment in segments]
    nexts = [segment.sample.tokens[segment.begin + 1 : segment.end + 1] for segment in segments]
    return {
        "tokens_N": np.concatenate(inputs),
        "predict_M": np.concatenate(predict),
        "targets_M": np.concatenate(targets),
        "rows_M": np.repeat(np.arange(len(samples)), counts),
        "lengths_S": counts,
        "advantages_M": np.repeat(advantages, counts),
        "logprobs_M": _joined(samples, "logprobs"),
        "reference_M": _joined(samples, "reference"),
        "kept_MK": _top_p_ids(samples),
        "next_N": np.concatenate(nexts),
        "routes_NLK": _routes(segments),
        "pairs_S": np.array([sample.pair for sample in samples]) if samples[0].pair else None,
        "spans_M": _spans(samples),
    }


def _joined(samples: list[Sample], name: str) -> np.ndarray | None:
    """Concatenate the field `name` of all samples to an array [M]; None if the first sample does not have
    it."""
    values = [getattr(sample, name) for sample in samples]
    return None if values[0] is None else np.concatenate(values)


def _routes(segments: list[Segment]) -> np.ndarray | None:
    """Return the experts that were chosen for each input token at sampling [N, L, K]; None unless all
    samples have them."""
    if any(segment.sample.routes is None for segment in segments):
        return None
    return np.concatenate([segment.sample.routes[segment.begin : segment.end] for segment in segments])


def _spans(samples: list[Sample]) -> np.ndarray | None:
    """Return the span numbers of all predictions [M], renumbered so that no two samples share a number; None
    if the samples have no spans."""
    if samples[0].spans is None:
        return None
    offset = 0
    shifted = []
    for sample in samples:
        shifted.append(np.where(sample.spans < 0, -1, sample.spans + offset))
        offset += sample.spans.max() + 1
    return np.concatenate(shifted)


def _labels(samples: list[Sample], device: Device) -> TopK | None:
    """Return the teacher's stored top-k labels of all samples as one `TopK`; None unless all samples have
    labels."""
    if any(sample.labels is None for sample in samples):
        return None

    def joined(name: str) -> Tensor:
        """Concatenate the field `name` of the labels of all samples to a tensor [M, ...]."""
        array = np.concatenate([getattr(sample.labels, name) for sample in samples])
        return torch.as_tensor(array, dtype=torch.long if name == "ids" else torch.float32, device=device)

    return TopK(joined("ids"), joined("logprobs"), joined("tail"))


def _top_p_ids(samples: list[Sample]) -> np.ndarray | None:
    """Return the token ids that top-p sampling left to choose from at each prediction [M, K], padded with
    -1; None if a sample has no such record."""
    if any(sample.kept is None for sample in samples):
        return None
    rows = [ids for sample in samples for ids in sample.kept]
    table = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return table


def to_samples(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float]],
    keep_mask: bool,
    mask_truncated: bool = False,
) -> list[Sample]:
    """Turn scored groups of completions into samples, with one advantage for each completion.

    The sampled token ids are used as they are; no text is tokenized again. With `keep_mask` each sample
    keeps the record of the token ids that top-p sampling left to choose from. With `mask_truncated`,
    completions that reached the token limit are left out."""
    samples = []
    for group, row in zip(groups, advantages, strict=True):
        for completion, advantage in zip(group.completions, row, strict=True):
            if mask_truncated and not completion.stopped:
                continue
            sample = Sample(
                tokens=np.concatenate([group.prompt_tokens, completion.tokens]),
                start=len(group.prompt_tokens),
                advantage=float(advantage),
                logprobs=completion.logprobs,
                kept=completion.kept if keep_mask else None,
                routes=completion.routes,
            )
            samples.append(sample)
    return samples
