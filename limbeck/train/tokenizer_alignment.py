"""Two tokenizers, one text: spans after which both have said the same characters.

Where vocabularies differ, distributions over tokens cannot be compared; what a teacher thinks of a span of text can. A
teacher's log-probability of a span is that of its own way of writing it, a lower bound of the text's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..text.tokenizer import Tokenizer
from ..types import Sample
from .batch import by_sample, pack
from .learner import Learner


def ends_said(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """After how many characters of the text each sampled token ends; -1 within a character, one past the text for
    the end of the turn."""
    text = tokenizer.decode(tokens)
    said = [tokenizer.decode(tokens[: i + 1]) for i in range(len(tokens))]
    ends = [len(begin) if text.startswith(begin) else -1 for begin in said]
    return np.array(
        [len(text) + 1 if token == tokenizer.end_id else end for token, end in zip(tokens, ends, strict=True)]
    )


def written(tokenizer: Tokenizer, text: str, stopped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a text as this tokenizer writes it, and where each ends."""
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids, ends = encoding.ids, [end for _, end in encoding.offsets]
    if stopped:
        ids, ends = [*ids, tokenizer.end_id], [*ends, len(text) + 1]
    return np.array(ids, np.int64), np.array(ends, np.int64)


def spans_of(ends: np.ndarray, common: np.ndarray) -> np.ndarray:
    """The span that each token is a part of; -1 after the last common end.

    >>> spans_of(np.array([3, 5, 9]), np.array([5, 9])).tolist()
    [0, 0, 1]
    """
    later = np.where(
        ends < 0, np.iinfo(ends.dtype).max, ends
    )  # a token within a character goes with the one that ends it
    spans = np.searchsorted(common, np.minimum.accumulate(later[::-1])[::-1])
    return np.where(spans < len(common), spans, -1)


def aligned(
    samples: Sequence[Sample], questions: Sequence[str], student: Tokenizer, teacher: Learner, tokenizer: Tokenizer, batch_tokens: int
) -> tuple[list[Sample], int]:  # fmt: skip
    """The samples with their spans and, at the end of each, the teacher's log-probability of it; tokens that it read."""
    theirs, spans = [], []
    for sample, question in zip(samples, questions, strict=True):
        said = sample.tokens[sample.start :]
        prompt = tokenizer.prompt(question)
        ids, ends = written(tokenizer, student.decode(said), bool(said[-1] == student.end_id))
        mine = ends_said(student, said)
        common = np.intersect1d(mine[mine >= 0], ends)
        theirs.append(Sample(np.concatenate([prompt, ids]), len(prompt)))
        spans.append((spans_of(mine, common), spans_of(ends, common), len(common)))
    batches = pack(theirs, batch_tokens)
    scored = by_sample(batches, teacher.logprobs(batches), len(theirs))
    marked = [
        _marked(sample, *span, logprobs)
        for sample, span, logprobs in zip(samples, spans, scored, strict=True)
    ]
    return marked, sum(len(s.tokens) for s in theirs)


def _marked(sample: Sample, mine: np.ndarray, theirs: np.ndarray, count: int, logprobs: np.ndarray) -> Sample:
    """`reference` is zero but for the last token of each span, where the teacher's verdict on it stands."""
    verdicts = np.bincount(theirs[theirs >= 0], weights=logprobs[theirs >= 0], minlength=count)
    last = len(mine) - 1 - np.unique(mine[::-1], return_index=True)[1]
    reference = np.zeros(len(mine), np.float32)
    for place in last:
        if mine[place] >= 0:
            reference[place] = verdicts[mine[place]]
    return replace(sample, spans=mine, reference=reference)
