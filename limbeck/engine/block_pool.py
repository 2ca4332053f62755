"""The blocks of keys and values that are free, and how many rows read each of the others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """The blocks `first` to `first + count - 1`, of which each is free or read by one row or more."""

    def __init__(self, first: int, count: int):
        self.count = count
        self.readers: dict[int, int] = {}
        self._free = OrderedDict.fromkeys(range(first, first + count))  # the next to be taken first

    @property
    def free(self) -> int:
        """The number of free blocks."""
        return len(self._free)

    def take(self, count: int, readers: int = 1) -> list[int]:
        """Return `count` free blocks, which so many rows are going to read; the pool must have them."""
        if count > self.free:
            raise IndexError(f"{count} blocks asked of a pool with {self.free}")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        self.readers.update(dict.fromkeys(blocks, readers))
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Give back the blocks of one row; those that no other row reads become free."""
        for block in blocks:
            self.readers[block] -= 1
            if not self.readers[block]:
                del self.readers[block]
                self._free[block] = None
