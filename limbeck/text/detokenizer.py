"""The incremental detokenizer: tokens to text while they are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # decoded from bytes that are no character, or not yet
MAX_INCOMPLETE = 3  # bytes of an incomplete character: a character has four at most
WINDOW = 32  # tokens after which the older ones are dropped
KEPT = 8  # tokens that are kept as context then


class Decoder(Protocol):
    """A tokenizer's `decode`."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens."""


class IncrementalDetokenizer:
    """Tokens in, text out as soon as it is certain: an incomplete character is held back. All texts and that
    of `close` together are `Tokenizer.decode` of all tokens."""

    def __init__(self, tokenizer: Decoder):
        self.tokenizer = tokenizer
        self.window: list[int] = []  # the last tokens: the text of some depends on those before
        self.emitted = ""  # the beginning of the window's text that was returned

    def read(self, tokens: Sequence[int]) -> str:
        """The text that has become certain with these tokens."""
        self.window += tokens
        text = self.tokenizer.decode(self.window)
        incomplete = len(text) - len(text.rstrip(REPLACEMENT))
        certain = text[: len(text) - min(incomplete, MAX_INCOMPLETE)]
        new = certain[len(self.emitted) :]
        if len(certain) >= len(self.emitted):
            self.emitted = certain
        if not incomplete and len(self.window) > WINDOW:
            self._shorten(text)
        return new

    def _shorten(self, text: str) -> None:
        """Drop all but the last tokens, if their text does not depend on the others."""
        kept = self.window[-KEPT:]
        tail = self.tokenizer.decode(kept)
        if text.endswith(tail) and REPLACEMENT not in tail:
            self.window = kept
            self.emitted = tail

    def close(self) -> str:
        """The text that is still held back."""
        return self.tokenizer.decode(self.window)[len(self.emitted) :]
