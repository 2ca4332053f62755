"""The prefix cache: the KV of recent sequences, which prompts that begin with the same tokens reuse.

Dimensions: N tokens.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from ..model.prefill_cache import SequenceKV

MAX_SEQUENCES = 256  # sequences in the cache: a lookup compares them one by one


class PrefixCache:
    """The KV of recent sequences, at most `max_bytes` bytes in total; the least recently used sequence is
    evicted first."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.sequences: OrderedDict[bytes, tuple[np.ndarray, SequenceKV]] = OrderedDict()

    def longest(self, prompt: np.ndarray) -> tuple[SequenceKV | None, int]:
        """Return the cached KV that shares the longest prefix with `prompt` [N], and the length of that
        prefix in tokens; (None, 0) if no cached sequence shares a token. The prefix never covers the whole
        prompt, since the last token must be run to get logits."""
        best = None
        length = 0
        for key, (tokens, _) in self.sequences.items():
            common = common_prefix_length(tokens, prompt[:-1])
            if common > length:
                best = key
                length = common
        if best is None:
            return None, 0
        self.sequences.move_to_end(best)
        _, past = self.sequences[best]
        return past, length

    def add(self, tokens: np.ndarray, past: SequenceKV) -> None:
        """Cache the KV `past` of `tokens` [N] and remove the cached sequences that are prefixes of `tokens`.
        Nothing changes if `tokens` equals or is a prefix of a cached sequence, or if `past` alone exceeds
        `max_bytes`."""
        if past.bytes > self.max_bytes:
            return
        extended: list[bytes] = []
        for key, (cached, _) in self.sequences.items():
            common = common_prefix_length(cached, tokens)
            if common == len(tokens):
                return
            if common == len(cached):
                extended.append(key)
        for key in extended:
            _, replaced = self.sequences.pop(key)
            self.bytes -= replaced.bytes
        self.sequences[tokens.tobytes()] = (tokens, past)
        self.bytes += past.bytes
        while self.bytes > self.max_bytes or len(self.sequences) > MAX_SEQUENCES:
            _, (_, evicted) = self.sequences.popitem(last=False)
            self.bytes -= evicted.bytes


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of tokens at the beginning that two sequences of token ids have in common."""
    shorter = min(len(a), len(b))
    differing = (a[:shorter] != b[:shorter]).nonzero()[0]
    return int(differing[0]) if len(differing) else shorter
