"""How a process gets its memory: glibc gives freed tensors back to the system and takes them again, page by page, each
step; and torch may ask for pages of two megabytes, which a processor finds sooner."""

from __future__ import annotations

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3), in malloc.h
OWN = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}  # with which somebody says otherwise


def keep_memory() -> None:
    """Keep what was freed, for tensors to come; before torch is imported. Where there is no glibc, nothing happens."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not OWN & os.environ.keys():
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
