"""Conversion from and to GGUF, llama.cpp's file format.

`read` converts a GGUF file to a HuggingFace model directory, `write` a directory to a GGUF file.
"""

from .reading import read
from .writing import TYPES, write

__all__ = ["TYPES", "read", "write"]
