"""The reasoning parser, which splits a completion into its thought (the reasoning between `<think>` and
`</think>`) and its answer, either as a whole or while it is sampled."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from ..types import Thought
from .detokenizer import Decoder

OPEN = "<think>"
CLOSE = "</think>"

Delta = tuple[str, str]  # ("thought" or "answer", text)


def split_thought(text: str) -> Thought:
    """Split a complete completion into thought and answer. It is `wellformed` if it has exactly one
    `</think>`, and at most one `<think>`, with no text before it.

    >>> split_thought("<think>2 and 2</think>4")
    Thought(thought='2 and 2', answer='4', wellformed=True)
    """
    opens = text.count(OPEN)
    closes = text.count(CLOSE)
    if not closes and not opens:
        return Thought("", text.strip(), False)
    if not closes:
        _, thought = text.split(OPEN, 1)
        return Thought(thought.strip(), "", False)
    before, answer = text.split(CLOSE, 1)
    head, _, thought = before.rpartition(OPEN)
    wellformed = closes == 1 and opens <= 1 and not head.strip()
    return Thought((thought if opens else before).strip(), answer.strip(), wellformed)


def count_thought_tokens(text: str, tokens: Sequence[int], tokenizer: Decoder, opened: bool = False) -> int:
    """Return the number of tokens between `<think>` and `</think>`; 0 without a thought, or if it is empty.

    `text` is that of the token ids `tokens` [N], which `tokenizer` decodes. A thought that is not closed goes
    to the last token. If `opened`, the prompt ends inside the thought, which then begins with the first
    token. A token that is also a part of a marker does not count."""
    close = text.find(CLOSE)
    end = len(text) if close < 0 else close
    opening = text.rfind(OPEN, 0, end)
    if opening < 0 and close < 0 and not opened:
        return 0
    begin = 0 if opening < 0 else opening + len(OPEN)
    if not text[begin:end].strip():
        return 0

    def decoded(count: int) -> int:
        """Return the number of characters of the first `count` tokens."""
        return len(tokenizer.decode(tokens[:count]))

    counts = range(len(tokens) + 1)
    first = bisect_left(counts, begin, key=decoded)
    after = bisect_right(counts, end, key=decoded) - 1
    return max(0, after - first)


def join_thought(thought: str, answer: str) -> str:
    """Return a completion that `split_thought` would split into this thought and answer. If the thought is
    empty, the completion is the answer alone."""
    if not thought.strip():
        return answer
    return f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{answer}"


def overlap(text: str, marker: str) -> int:
    """Return the number of characters at the end of `text` that are the beginning of `marker`; a complete
    marker does not count.

    >>> overlap("so it is 4</th", "</think>")
    4
    """
    longest = min(len(text), len(marker) - 1)
    for length in range(longest, 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


class ReasoningParser:
    """Splits a completion into thought and answer while it is sampled. `parse` takes the next piece of text
    and returns deltas: pairs of "thought" or "answer" and new text.

    Deltas contain neither tags nor the white space around thought and answer. `opened` is True if the prompt
    ends inside a thought. `stops` are strings that end an answer, but never a thought. If `plain`, the whole
    completion is an answer, and its white space is kept. The attribute `kind` is the part that is being read
    ("" until known); `stopped` is True once a stop string was found.
    """

    def __init__(self, opened: bool = False, stops: Sequence[str] = (), plain: bool = False):
        self.kind = ""
        if plain:
            self.kind = "answer"
        elif opened:
            self.kind = "thought"
        self.stops = tuple(stops)
        self.plain = plain
        self.stopped = False
        self._buffer = ""  # text that is not yet certain
        self._begun = plain  # True if the current part has had a delta; until then leading space is dropped

    def parse(self, text: str) -> list[Delta]:
        """Add `text` to the completion and return the deltas that have become certain."""
        self._buffer += text
        deltas: list[Delta] = []
        if not self.kind:
            self._find_opening()
        if self.kind == "thought":
            self._parse_thought(deltas)
        if self.kind == "answer" and not self.stopped:
            self._parse_answer(deltas)
        return deltas

    def close(self) -> list[Delta]:
        """Return the deltas of the text that is still held back, once no more text follows."""
        deltas: list[Delta] = []
        if not self.stopped:
            self.kind = self.kind or "answer"
            self._emit(deltas, self._strip_end(self._buffer), "")
        return deltas

    def _find_opening(self) -> None:
        """Decide whether the completion begins with a thought, once its text contains the whole opening tag
        or differs from it."""
        begin = self._buffer.lstrip()
        if begin.startswith(OPEN):
            self.kind = "thought"
            self._buffer = begin.removeprefix(OPEN)
        elif not OPEN.startswith(begin):
            self.kind = "answer"

    def _parse_thought(self, deltas: list[Delta]) -> None:
        thought, close, rest = self._buffer.partition(CLOSE)
        if not close:
            self._emit_certain(deltas, (CLOSE,))
            return
        self._emit(deltas, thought.rstrip(), "")
        self.kind = "answer"
        self._begun = False
        self._buffer = rest

    def _parse_answer(self, deltas: list[Delta]) -> None:
        if not self._begun:
            self._buffer = self._buffer.lstrip()
        places = [place for place in map(self._buffer.find, self.stops) if place >= 0]
        if places:
            self.stopped = True
            self._emit(deltas, self._strip_end(self._buffer[: min(places)]), "")
        else:
            self._emit_certain(deltas, self.stops)

    def _emit_certain(self, deltas: list[Delta], markers: Sequence[str]) -> None:
        """Append to `deltas` all text but its end, if that may be the beginning of one of `markers` or is
        white space that no other text follows yet."""
        held_back = max((overlap(self._buffer, marker) for marker in markers), default=0)
        certain = self._strip_end(self._buffer[: len(self._buffer) - held_back])
        self._emit(deltas, certain, self._buffer[len(certain) :])

    def _strip_end(self, text: str) -> str:
        return text if self.plain else text.rstrip()

    def _emit(self, deltas: list[Delta], text: str, buffer: str) -> None:
        """Append `text` to `deltas` unless it is empty, and keep `buffer` as the text that is not certain
        yet."""
        self._buffer = buffer
        if not self._begun:
            text = text.lstrip()
        if text:
            self._begun = True
            deltas.append((self.kind, text))
