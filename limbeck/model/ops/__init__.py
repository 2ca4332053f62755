"""The operations of a decoder, one table for each kind of device: the only place that knows of devices.

`plain` is torch on any device and in any dtype, and the reference of the tests; `cpu` uses the compiled C++
kernels where they are faster; `cuda` uses Triton kernels whose results do not depend on the batch. A table is
chosen once, when a model is placed on a device (`place`), and every layer keeps it as `ops`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from . import devices
from .cpu import CPU, CPUOps
from .plain import MPSOps, PlainOps
from .table import Ops

__all__ = ["CPU", "CPUOps", "MPSOps", "Ops", "PlainOps", "devices", "ops_for", "place", "use"]


@cache
def _table(kind: str, exact: bool) -> Ops:
    """Return the table of operations for a kind of device, such as `cpu`, `cuda` or `mps`."""
    if kind == "cuda":
        from .cuda import CUDAOps, FastCUDAOps  # import Triton, which only builds of torch for cards bring

        return CUDAOps() if exact else FastCUDAOps()
    return {"cpu": CPU, "mps": MPSOps()}.get(kind) or PlainOps()


def ops_for(device: torch.device | str, exact: bool = True) -> Ops:
    """Return the table of operations for a device, or for `plain` (devices.py). Without `exact` the learner's
    may be faster on a card, and then agree with the sampler's within rounding only."""
    return _table(devices.PLAIN if device == devices.PLAIN else torch.device(device).type, exact)


def use(model: nn.Module, table: Ops) -> nn.Module:
    """Give all layers of a model a table of operations; return the model."""
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = table
    return model


def place(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None, exact: bool = True
) -> nn.Module:
    """Move a model to a device and give its layers the operations of that device; return it.

    `dtype` is the type of its weights (None: as they are). The tables of rotary angles stay in float32.
    """
    tables = {name: buffer.float() for name, buffer in model.named_buffers() if name in ("cos", "sin")}
    where = devices.torch_device(str(device))
    model.to(device=where, dtype=dtype)
    for name, buffer in tables.items():
        setattr(model, name, buffer.to(where))
    return use(model, ops_for(device, exact))
