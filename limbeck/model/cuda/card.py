"""What the kernels have to know of a card."""

from __future__ import annotations

from functools import cache

import torch
from triton.runtime import driver

SPARE_SHARED = 24 << 10  # bytes of shared memory for everything but the pipeline: queries, sums, barriers


@cache
def shared_bytes(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use on a card."""
    if device.type != "cuda":  # the interpreter of the tests has no limit
        return 1 << 30
    place = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(place)["max_shared_mem"]


def stages(wanted: int, stage_bytes: int, device: torch.device) -> int:
    """Return the stages of a kernel's pipeline: as many as wanted, if a card's shared memory holds them.

    `stage_bytes` are the bytes of one. The results do not depend on it.
    """
    return max(1, min(wanted, (shared_bytes(device) - SPARE_SHARED) // stage_bytes))
