"""A pool of blocks whose keys and values stay known until the blocks are taken again, so that prompts that
begin with the same tokens share them.

Each known block is named by a hash of all tokens up to its last one (as in vLLM: Kwon et al. 2023, arXiv
2309.06180, and its automatic prefix caching). N tokens of a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from ..model.ops.table import BLOCK
from .block_pool import BlockPool


class PrefixPool(BlockPool):
    """The blocks `first` to `first + count - 1`. Free blocks keep what they hold; those that have been free
    for the longest time are taken first."""

    def __init__(self, first: int, count: int):
        super().__init__(first, count)
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    def find(self, tokens: np.ndarray) -> list[int]:
        """Return the blocks that hold the longest known beginning of a prompt [N]. It never covers the whole
        prompt, since the last token must be run to get logits."""
        blocks = []
        for name in _names(tokens[:-1]):
            if name not in self._block_of:
                break
            blocks.append(self._block_of[name])
        return blocks

    def remember(self, tokens: np.ndarray, blocks: Sequence[int]) -> None:
        """Keep in mind that `blocks` hold the keys and values of `tokens` [N]; a last block that they do not
        fill is not kept."""
        for name, block in zip(_names(tokens), blocks, strict=False):
            if name not in self._block_of and block not in self._name_of:
                self._block_of[name] = block
                self._name_of[block] = name

    def unread(self, blocks: Sequence[int]) -> int:
        """Return how many of the blocks are free."""
        return sum(block not in self.readers for block in blocks)

    def share(self, blocks: Sequence[int], readers: int = 1) -> None:
        """Let so many more rows read blocks that are known; those that were free are not any more."""
        for block in blocks:
            self._free.pop(block, None)
            self.readers[block] = self.readers.get(block, 0) + readers

    def take(self, count: int, readers: int = 1) -> list[int]:
        """Return `count` free blocks, which so many rows are going to write and read; the pool must have
        them. What they held is forgotten."""
        blocks = super().take(count, readers)
        for block in blocks:
            name = self._name_of.pop(block, None)
            if name is not None:
                del self._block_of[name]
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back the blocks of one row. Those at its end are taken first, since they are of no use without
        those before them."""
        super().release(reversed(blocks))


def _names(tokens: np.ndarray) -> Iterator[bytes]:
    """Yield the name of each block that a sequence [N] fills."""
    name = b""
    for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
        block = np.ascontiguousarray(tokens[begin : begin + BLOCK], dtype=np.int64)
        name = hashlib.blake2b(name + block.tobytes(), digest_size=16).digest()
        yield name
