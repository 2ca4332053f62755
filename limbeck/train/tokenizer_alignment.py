"""Alignment of the tokenizations of one text by two tokenizers. A span is the text between two neighbouring
positions where a token ends in both tokenizations.

Where vocabularies differ, distributions over tokens cannot be compared, but probabilities of spans of text
can. The teacher's log-probability of a span is that of the span's tokens in the teacher's own tokenization.
That is a lower bound, since other tokenizations of the same text are not counted.

Dimensions: T tokens of one completion (student's tokenizer) · M tokens of the same text (teacher's
tokenizer) · J spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..text.tokenizer import Tokenizer
from ..types import Message, Sample
from .batch import by_sample
from .scorer import Scorer


def token_ends(tokenizer: Tokenizer, tokens_T: np.ndarray) -> np.ndarray:
    """Return, for each token [T], the position in the decoded text where it ends, in characters.

    The position is -1 for a token that ends inside a character, and one more than the length of the text for
    the end-of-turn token."""
    text = tokenizer.decode(tokens_T)
    ends = []
    for i, token in enumerate(tokens_T):
        prefix = tokenizer.decode(tokens_T[: i + 1])
        end = len(prefix) if text.startswith(prefix) else -1
        ends.append(len(text) + 1 if token == tokenizer.end_id else end)
    return np.array(ends)


def encode_with_ends(tokenizer: Tokenizer, text: str, stopped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of a text [M], and the position where each token ends, in characters [M]. If
    `stopped`, the end-of-turn token is appended; its position is one more than the length of the text."""
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = list(encoding.ids)
    ends = [end for _, end in encoding.offsets]
    if stopped:
        ids.append(tokenizer.end_id)
        ends.append(len(text) + 1)
    return np.array(ids, np.int64), np.array(ends, np.int64)


def spans_of(ends_T: np.ndarray, common_J: np.ndarray) -> np.ndarray:
    """Return the number of the span that each token is in [T], from 0; -1 for a token after the last common
    end. `ends_T` is the position where each token ends; `common_J` the positions where a token ends in both
    tokenizations.

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
    questions: Sequence[str | Sequence[Message]],
    student: Tokenizer,
    teacher: Scorer,
    tokenizer: Tokenizer,
    batch_tokens: int,
) -> tuple[list[Sample], int]:
    """Return copies of the student's samples that also hold their spans and, at the last token of each span,
    the teacher's log-probability of the span; and the number of tokens that the teacher processed.

    `questions` are the texts of the prompts, one for each sample. `student` is the student's tokenizer,
    `tokenizer` the teacher's. `batch_tokens` is the size of a micro-batch in input tokens."""
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
    batches = teacher.pack(rewritten, batch_tokens)
    logprobs = by_sample(batches, teacher.logprobs(batches), len(rewritten))
    with_spans = []
    for sample, (spans_T, spans_M, count), logprobs_M in zip(samples, spans, logprobs, strict=True):
        inside_M = spans_M >= 0
        totals_J = np.bincount(spans_M[inside_M], weights=logprobs_M[inside_M], minlength=count)
        with_spans.append(replace(sample, spans=spans_T, reference=_at_span_ends(spans_T, totals_J)))
    return with_spans, sum(len(sample.tokens) for sample in rewritten)


def _at_span_ends(spans_T: np.ndarray, totals_J: np.ndarray) -> np.ndarray:
    """Return an array [T] that holds, at the last token of each span, the value of the span in `totals_J`,
    and zero elsewhere."""
    reference_T = np.zeros(len(spans_T), np.float32)
    last = len(spans_T) - 1 - np.unique(spans_T[::-1], return_index=True)[1]
    for place in last:
        if spans_T[place] >= 0:
            reference_T[place] = totals_J[spans_T[place]]
    return reference_T
