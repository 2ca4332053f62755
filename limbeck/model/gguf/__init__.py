"""GGUF, llama.cpp's file format: `read` makes a HuggingFace directory of one, `write` makes one of a
directory.
"""

from .reading import read
from .writing import TYPES, write

__all__ = ["TYPES", "read", "write"]
