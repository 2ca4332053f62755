"""Compiled kernels, where there is a C++ compiler, for each operation that they do faster than plain torch.

`source/` does in one pass over memory what torch does in many: norms, SwiGLU, rotations, attention without
padding, a whole decode step, and the draw of a token. The kernels compute in float32 on a CPU; all else runs
in plain torch, which is also the oracle of the tests. `build` compiles, `choice` measures and decides,
`operations` and `decode_step` call. `decode_step`, which knows the decoder, is imported by itself.
"""

from __future__ import annotations

from .build import found, instructions, lanes, library, mode
from .choice import Timing, adopt, current, forced, forget, record, serves, serves_product, takes, timings
from .operations import Attention, Mixture, Normalize, Rotate, SwiGLU, Trees, linear, sample

__all__ = [
    "Attention",
    "Mixture",
    "Normalize",
    "Rotate",
    "SwiGLU",
    "Timing",
    "Trees",
    "adopt",
    "current",
    "forced",
    "forget",
    "found",
    "instructions",
    "lanes",
    "library",
    "linear",
    "mode",
    "record",
    "sample",
    "serves",
    "serves_product",
    "takes",
    "timings",
]
