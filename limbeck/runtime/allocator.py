"""Settings of the memory allocator that make training faster.

By default glibc returns the memory of freed tensors to the operating system and must request it again, page
by page, in each step. torch can also ask for 2 MiB pages, which need fewer address translations.
"""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD = -1  # name of a parameter of glibc's mallopt(3), in malloc.h
MMAP_THRESHOLD = -3  # name of a parameter of glibc's mallopt(3), in malloc.h
USER_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
}  # environment variables that take precedence


def keep_memory() -> None:
    """Make the allocator keep freed memory for later tensors. Call it before torch is imported. It has no
    effect without glibc, or if the user has set the allocator's environment variables."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if os.name != "posix" or USER_SETTINGS & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
