"""What people do to a text at the desk: how it differs from what it was, what could go, what is in another language.

A text is seen as *pieces*: a word with the blanks behind it, or one Chinese character.
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
_MARKED = {
    True: re.compile(rf"{_TAG}|(?P<strange>[{HAN}]+)"),
    False: re.compile(
        rf"{_TAG}|(?<![\\A-Za-z])(?P<strange>[A-Za-z]{{2,}}(?:['’][A-Za-z]+| +[A-Za-z]{{2,}})*)"
    ),
}
_SENTENCE = re.compile(r"[^\n.!?。！？]*(?:\n|[.!?。！？]+\s*|$)")
CLOSE = "</answer>"
LONGEST = 400  # pieces: longer passages are seldom said again word for word
LEAST = 8  # pieces that have to be superfluous before they are called repeated
TOO_MANY = 2_000_000  # pairs of equal pieces to choose among; beyond it a changed passage is shown as replaced at once


def pieces(text: str) -> list[str]:
    """The text in pieces; joined they are the text again.

    >>> pieces("try 5 先算")
    ['try ', '5 ', '先', '算']
    """
    return _PIECE.findall(text)


def sentences(text: str) -> list[str]:
    """The text in lines, and lines in sentences; joined they are the text again."""
    return [sentence for sentence in _SENTENCE.findall(text) if sentence]


def parts(text: str, size: int = 4000) -> Iterator[str]:
    """The text in parts of whole sentences, each about `size` characters or one sentence long: a browser draws those in sight."""
    held = ""
    for sentence in sentences(text):
        if held and len(held) + len(sentence) > size:
            yield held
            held = ""
        held += sentence
    yield held


def difference(before: str, after: str) -> list[tuple[str, str, str]]:
    """Passages in order: `("same", text, text)` or `("changed", old, new)`, where old or new may be empty.

    Sentences first, words where sentences differ: a long thought with a few changes is compared in a moment.
    """
    found: list[tuple[str, str, str]] = []
    for same, old, new in _matched(sentences(before), sentences(after)):
        found += [(same, old, new)] if same == "same" else _matched(pieces(old), pieces(new))
    return found


def _matched(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    head = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )
    most = min(len(old), len(new)) - head
    tail = next((i for i in range(most) if old[-1 - i] != new[-1 - i]), most)
    middle, changed = old[head : len(old) - tail], new[head : len(new) - tail]
    if head:
        yield "same", "".join(old[:head]), "".join(new[:head])
    first, second = Counter(middle), Counter(changed)
    if sum(first[piece] * second[piece] for piece in first) > TOO_MANY:
        yield "changed", "".join(middle), "".join(changed)
    else:
        for kind, i, j, k, m in SequenceMatcher(None, middle, changed, autojunk=False).get_opcodes():
            yield "same" if kind == "equal" else "changed", "".join(middle[i:j]), "".join(changed[k:m])
    if tail:
        yield "same", "".join(old[len(old) - tail :]), "".join(new[len(new) - tail :])


def trimmed(text: str) -> str:
    """The text with passages that are said again and again said once, and nothing behind its answer.

    >>> trimmed("<think> " + "wait 5 + 1 makes 6 no " * 9 + "</think> <answer> 6 </answer> so I hope")
    '<think> wait 5 + 1 makes 6 no </think> <answer> 6 </answer>'
    """
    if CLOSE in text:
        text = text[: text.index(CLOSE) + len(CLOSE)]
    words = pieces(text)
    known: dict[str, int] = {}
    ids = np.array([known.setdefault(word.strip(), len(known)) for word in words], int)
    for span in range(1, min(LONGEST, len(ids) // 2) + 1):
        keep = _once(ids, span)
        if not keep.all():
            ids, words = ids[keep], [words[i] for i in np.flatnonzero(keep)]
    return "".join(words).strip()


def _once(ids: np.ndarray, span: int) -> np.ndarray:
    """Which pieces to keep so that no passage of `span` pieces stands twice in a row."""
    keep = np.ones(len(ids), bool)
    same = np.zeros(max(0, len(ids) - span) + 2, bool)  # with an edge at either end
    same[1:-1] = ids[:-span] == ids[span:]  # a piece and the one `span` further on
    edges = np.flatnonzero(same[1:] != same[:-1])
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        superfluous = (end - begin) // span * span
        if superfluous >= LEAST:
            keep[begin + span : begin + span + superfluous] = False
    return keep


def marked(text: str, language: str) -> Iterator[tuple[str, str]]:
    """The text in passages, each with what it is: `tag`; `strange`, in another script than the language's (Chinese in an
    English thought, Latin words in a Chinese one; commands of LaTeX and single letters belong to both); or neither, "".

    >>> list(marked("<think> try 5 先算", "en"))
    [('<think>', 'tag'), (' try 5 ', ''), ('先算', 'strange')]
    """
    end = 0
    for match in _MARKED[language != "zh"].finditer(text):
        if match.start() > end:
            yield text[end : match.start()], ""
        yield match.group(), match.lastgroup
        end = match.end()
    if end < len(text):
        yield text[end:], ""
