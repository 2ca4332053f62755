"""Alignment of two tokenizers over one text: spans after which both have written the same characters.

Where vocabularies differ, distributions over tokens cannot be compared, but probabilities of spans of text
can. The teacher's log-probability of a span is that of its own tokenization, a lower bound of the text's. T
tokens of one completion · M tokens of the teacher's tokenization · J spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..text.tokenizer import Tokenizer
from ..types import Sample
from .batch import by_sample, pack
from .scorer import Scorer


def token_ends(tokenizer: Tokenizer, tokens_T: np.ndarray) -> np.ndarray:
    """The number of characters up to the end of each token [T]; -1 if it ends within a character, one past
    the text for the end of the turn."""
    text = tokenizer.decode(tokens_T)
    ends = []
    for i, token in enumerate(tokens_T):
        prefix = tokenizer.decode(tokens_T[: i + 1])
        end = len(prefix) if text.startswith(prefix) else -1
        ends.append(len(text) + 1 if token == tokenizer.end_id else end)
    return np.array(ends)


def encode_with_ends(tokenizer: Tokenizer, text: str, stopped: bool) -> tuple[np.ndarray, np.ndarray]:
    """A text's token ids [M], with the end of the turn if `stopped`, and the end of each in characters
    [M]."""
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = list(encoding.ids)
    ends = [end for _, end in encoding.offsets]
    if stopped:
        ids.append(tokenizer.end_id)
        ends.append(len(text) + 1)
    return np.array(ids, np.int64), np.array(ends, np.int64)


def spans_of(ends_T: np.ndarray, common_J: np.ndarray) -> np.ndarray:
    """The span of each token [T]; -1 after the last common end.

    >>> spans_of(np.array([3, 5, 9]), np.array([5, 9])).tolist()
    [0, 0, 1]
    """
    # a token that ends within a character is in the span of the token that ends the character
    later_T = np.where(ends_T < 0, np.iinfo(ends_T.dtype).max, ends_T)
    next_T = np.minimum.accumulate(later_T[::-1])[::-1]
    spans_T = np.searchsorted(common_J, next_T)
    return np.where(spans_T < len(common_J), spans_T, -1)


def aligned(
    samples: Sequence[Sample],
    questions: Sequence[str],
    student: Tokenizer,
    teacher: Scorer,
    tokenizer: Tokenizer,
    batch_tokens: int,
) -> tuple[list[Sample], int]:
    """The samples with their spans and, at the end of each span, the teacher's log-probability of it; and the
    tokens of the teacher's forward pass. `tokenizer` is the teacher's."""
    rewritten = []
    spans = []
    for sample, question in zip(samples, questions, strict=True):
        tokens_T = sample.tokens[sample.start :]
        stopped = bool(tokens_T[-1] == student.end_id)
        ids_M, ends_M = encode_with_ends(tokenizer, student.decode(tokens_T), stopped)
        ends_T = token_ends(student, tokens_T)
        common_J = np.intersect1d(ends_T[ends_T >= 0], ends_M)
        prompt = tokenizer.prompt(question)
        rewritten.append(Sample(np.concatenate([prompt, ids_M]), len(prompt)))
        spans.append((spans_of(ends_T, common_J), spans_of(ends_M, common_J), len(common_J)))
    batches = pack(rewritten, batch_tokens)
    logprobs = by_sample(batches, teacher.logprobs(batches), len(rewritten))
    with_spans = []
    for sample, (spans_T, spans_M, count), logprobs_M in zip(samples, spans, logprobs, strict=True):
        inside_M = spans_M >= 0
        totals_J = np.bincount(spans_M[inside_M], weights=logprobs_M[inside_M], minlength=count)
        with_spans.append(replace(sample, spans=spans_T, reference=_at_span_ends(spans_T, totals_J)))
    return with_spans, sum(len(sample.tokens) for sample in rewritten)


def _at_span_ends(spans_T: np.ndarray, totals_J: np.ndarray) -> np.ndarray:
    """Zero but at the last token of each span, where the span's total is [T]."""
    reference_T = np.zeros(len(spans_T), np.float32)
    last = len(spans_T) - 1 - np.unique(spans_T[::-1], return_index=True)[1]
    for place in last:
        if spans_T[place] >= 0:
            reference_T[place] = totals_J[spans_T[place]]
    return reference_T
