"""Settings of the memory allocator. By default glibc returns freed tensors to the system and takes their
memory again, page by page, in each step; and torch can ask for pages of two megabytes, which a processor
finds sooner."""

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
    """Keep freed memory for later tensors. Call before importing torch; without glibc it does nothing."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if os.name != "posix" or USER_SETTINGS & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
