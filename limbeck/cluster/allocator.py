"""How a process gets its memory: glibc gives freed tensors back to the system and takes them again, page by page, each
step; and torch may ask for pages of two megabytes, which a processor finds sooner."""

from __future__ import annotations

import ctypes
import os

# what a process is started with, unless its environment says otherwise
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31), "THP_MEM_ALLOC_ENABLE": "1"}
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3), malloc.h


def keep_memory() -> None:
    """The same for the process that runs already; torch must not have been imported in it. Elsewhere than on glibc, nothing."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", ENVIRONMENT["THP_MEM_ALLOC_ENABLE"])
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not ENVIRONMENT.keys() & os.environ.keys() - {"THP_MEM_ALLOC_ENABLE"}:
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
