"""Compiled C++ kernels for each operation that they do faster than plain torch, if there is a compiler.

The code in `source/` does in one pass over memory what torch does in many: norms, SwiGLU, rotations,
attention without padding, a whole decode step, and the sampling of a token. The kernels compute in float32 on
a CPU; everything else runs in plain torch, which is also the reference in the tests. `build` compiles the
kernels, `choice` measures them and decides when to use them, `operations` and `decode_step` call them.
`decode_step` is not imported here, because it imports the decoder.
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
