"""Help with editing a text under review: its difference from the original, the removal of repetitions, and
the marking of words in another language.

A *piece* is a word with the white space around it, or one Chinese character or punctuation mark. Texts are
compared piece by piece.

N  pieces of a text
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

import numpy as np

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_PIECE = re.compile(rf"\s*(?:[{HAN}，。！？；：、]|</?\w+>|[^\s{HAN}，。！？；：、<]+|<)\s*|\s+")
_TAG = r"(?P<tag></?[a-z]+>)"
_LATIN_WORDS = r"[A-Za-z]{2,}(?:['’][A-Za-z]+| +[A-Za-z]{2,})*"
_STRANGE_TO_LATIN = re.compile(rf"{_TAG}|(?P<strange>[{HAN}]+)")
_STRANGE_TO_CHINESE = re.compile(rf"{_TAG}|(?<![\\A-Za-z])(?P<strange>{_LATIN_WORDS})")
_SENTENCE = re.compile(r"[^\n.!?。！？]*(?:\n|[.!?。！？]+\s*|$)")
CLOSE = "</answer>"
MAX_SPAN = 400  # pieces: longer passages are seldom repeated word for word
MIN_SUPERFLUOUS = 8  # pieces that a repetition must add before it is trimmed
MAX_EQUAL_PAIRS = 2_000_000  # pairs of equal pieces; beyond it a changed passage is shown as replaced at once

Passage = tuple[str, str, str]


def pieces(text: str) -> list[str]:
    """Split a text into pieces; joined, they are the text again.

    >>> pieces("try 5 先算")
    ['try ', '5 ', '先', '算']
    """
    return _PIECE.findall(text)


def sentences(text: str) -> list[str]:
    """Split a text at the ends of lines and sentences; joined, the sentences are the text again."""
    return [sentence for sentence in _SENTENCE.findall(text) if sentence]


def parts(text: str, size: int = 4000) -> Iterator[str]:
    """Split a text into parts of whole sentences. A part has up to `size` characters, or is one longer
    sentence. A browser can then skip drawing the parts that are out of sight."""
    part = ""
    for sentence in sentences(text):
        if part and len(part) + len(sentence) > size:
            yield part
            part = ""
        part += sentence
    yield part


# ---------------------------------------------------------------- difference


def difference(before: str, after: str) -> list[Passage]:
    """Return the passages of two texts in order: `("same", text, text)` or `("changed", old, new)`, where
    `old` or `new` may be empty.

    Sentences are compared first, then the pieces of sentences that differ. This is fast for a long text with
    few changes.
    """
    passages: list[Passage] = []
    for kind, old, new in _match(sentences(before), sentences(after)):
        if kind == "same":
            passages.append((kind, old, new))
        else:
            passages += _match(pieces(old), pieces(new))
    return passages


def _match(old: Sequence[str], new: Sequence[str]) -> Iterator[Passage]:
    """Yield the passages of two sequences of strings: the part that both begin with, the middle, and the part
    that both end with."""
    head = _common_head(old, new)
    old_rest = old[head:]
    new_rest = new[head:]
    tail = _common_head(old_rest[::-1], new_rest[::-1])
    if head:
        yield "same", "".join(old[:head]), "".join(new[:head])
    yield from _match_middle(old_rest[: len(old_rest) - tail], new_rest[: len(new_rest) - tail])
    if tail:
        yield "same", "".join(old[-tail:]), "".join(new[-tail:])


def _common_head(old: Sequence[str], new: Sequence[str]) -> int:
    """Return the number of equal elements at the beginning of two sequences."""
    for i, (before, after) in enumerate(zip(old, new, strict=False)):
        if before != after:
            return i
    return min(len(old), len(new))


def _match_middle(old: Sequence[str], new: Sequence[str]) -> Iterator[Passage]:
    old_counts = Counter(old)
    new_counts = Counter(new)
    equal_pairs = sum(count * new_counts[piece] for piece, count in old_counts.items())
    if equal_pairs > MAX_EQUAL_PAIRS:
        yield "changed", "".join(old), "".join(new)
        return
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    for tag, old_begin, old_end, new_begin, new_end in matcher.get_opcodes():
        kind = "same" if tag == "equal" else "changed"
        yield kind, "".join(old[old_begin:old_end]), "".join(new[new_begin:new_end])


# ---------------------------------------------------------------- trimming


def trimmed(text: str) -> str:
    """Return the text with each passage that is repeated several times in a row reduced to one copy, and
    without what follows its final answer.

    >>> trimmed("<think> " + "wait 5 + 1 makes 6 no " * 9 + "</think> <answer> 6 </answer> so I hope")
    '<think> wait 5 + 1 makes 6 no </think> <answer> 6 </answer>'
    """
    if CLOSE in text:
        text = text[: text.index(CLOSE) + len(CLOSE)]
    words = pieces(text)
    vocabulary: dict[str, int] = {}
    ids_N = np.array([vocabulary.setdefault(word.strip(), len(vocabulary)) for word in words], int)
    for span in range(1, min(MAX_SPAN, len(ids_N) // 2) + 1):
        keep_N = _keep_once(ids_N, span)
        if not keep_N.all():
            ids_N = ids_N[keep_N]
            words = [words[i] for i in np.flatnonzero(keep_N)]
    return "".join(words).strip()


def _keep_once(ids_N: np.ndarray, span: int) -> np.ndarray:
    """Return a mask [N] of the pieces to keep, so that no passage of `span` pieces is repeated directly after
    itself."""
    keep_N = np.ones(len(ids_N), bool)
    same = np.zeros(max(0, len(ids_N) - span) + 2, bool)  # [N - span + 2], with an edge at either end
    same[1:-1] = ids_N[:-span] == ids_N[span:]  # a piece and the one `span` further on
    edges = np.flatnonzero(same[1:] != same[:-1])
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        superfluous = (end - begin) // span * span
        if superfluous >= MIN_SUPERFLUOUS:
            keep_N[begin + span : begin + span + superfluous] = False
    return keep_N


# ---------------------------------------------------------------- languages


def marked(text: str, language: str) -> Iterator[tuple[str, str]]:
    """Yield the text in passages as (passage, mark). The mark is "tag" for a tag such as `<think>`, "strange"
    for text in another script than that of `language`, and "" for all other text.

    Chinese characters are strange if `language` is "en", Latin words if it is "zh". LaTeX commands and single
    letters are never strange.

    >>> list(marked("<think> try 5 先算", "en"))
    [('<think>', 'tag'), (' try 5 ', ''), ('先算', 'strange')]
    """
    pattern = _STRANGE_TO_CHINESE if language == "zh" else _STRANGE_TO_LATIN
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            yield text[end : match.start()], ""
        yield match.group(), match.lastgroup
        end = match.end()
    if end < len(text):
        yield text[end:], ""
