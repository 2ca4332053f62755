"""The incremental detokenizer, which converts tokens to text while they are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # decoded from bytes that are no character, or not yet
MAX_INCOMPLETE = 3  # bytes of an incomplete character: a character has four at most
WINDOW = 32  # number of tokens beyond which older ones are dropped
KEPT = 8  # number of last tokens that are kept as context when older ones are dropped


class Decoder(Protocol):
    """Any tokenizer with a method `decode`."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of the token ids."""


class IncrementalDetokenizer:
    """Converts tokens to text while they are sampled. Text is returned once later tokens cannot change it:
    the bytes of an incomplete character are held back. The texts that `read` and `close` return, joined,
    equal `Tokenizer.decode` of all tokens."""

    def __init__(self, tokenizer: Decoder):
        self.tokenizer = tokenizer
        self.window: list[int] = []  # the last tokens: the text of some depends on those before
        self.emitted = ""  # the beginning of the window's text that was returned

    def read(self, tokens: Sequence[int]) -> str:
        """Add `tokens` to the sequence and return the text that has become certain."""
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
        """Forget all but the last `KEPT` tokens, if the text of these does not depend on the forgotten ones.
        `text` is the text of all tokens in the window."""
        kept = self.window[-KEPT:]
        tail = self.tokenizer.decode(kept)
        if text.endswith(tail) and REPLACEMENT not in tail:
            self.window = kept
            self.emitted = tail

    def close(self) -> str:
        """Return the text that is still held back, once no more tokens follow."""
        return self.tokenizer.decode(self.window)[len(self.emitted) :]
