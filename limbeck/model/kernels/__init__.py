"""Compiled kernels, where there is a C++ compiler, for each operation that they do faster than plain torch.

`source/` does in one pass over memory what torch does in many: norms, SwiGLU, rotations, attention without padding, a
whole step of decoding, and the draw of a token. All is float32 on a CPU; whatever else is asked goes the plain way, which
is also the oracle of the tests. `build` compiles, `choice` measures and decides, `operations` and `decoding` call.
"""

from __future__ import annotations

from .build import found, instructions, lanes, library, mode
from .choice import Timing, adopt, current, forced, forget, record, serves, serves_product, takes, timings
from .decoding import Decoding
from .operations import Attention, Mixture, Normalize, Rotate, SwiGLU, Trees, linear, sample

__all__ = [
    "Attention", "Decoding", "Mixture", "Normalize", "Rotate", "SwiGLU", "Timing", "Trees", "adopt", "current", "forced", "forget", "found",
    "instructions", "lanes", "library", "linear", "mode", "record", "sample", "serves", "serves_product", "takes", "timings",
]  # fmt: skip
