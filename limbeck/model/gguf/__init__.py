"""Conversion from and to GGUF, llama.cpp's file format.

`read` converts a GGUF file to a HuggingFace model directory, `write` a directory to a GGUF file.
`read_config` reads only the shapes of a file's model.
"""

from .reading import read, read_config
from .writing import TYPES, check_type, write

__all__ = ["TYPES", "check_type", "read", "read_config", "write"]
