"""What the kernels have to know of a card."""

from __future__ import annotations

from functools import cache

import torch

LEAST_SHARED = 99 << 10  # bytes of shared memory that a program may use on every card from Ampere on
SPARE_SHARED = 24 << 10  # bytes of it for everything but the pipeline: queries, sums, barriers


@cache
def shared_bytes(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use on a card."""
    if device.type != "cuda":  # the interpreter of the tests has no limit
        return 1 << 30
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", LEAST_SHARED)


def stages(wanted: int, stage_bytes: int, device: torch.device) -> int:
    """Return the stages of a kernel's pipeline: as many as wanted, if a card's shared memory holds them.

    `stage_bytes` are the bytes of one. The results do not depend on it.
    """
    return max(1, min(wanted, (shared_bytes(device) - SPARE_SHARED) // stage_bytes))
