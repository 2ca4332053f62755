"""The first recipe of a new user, which `limbeck init` writes: from a base model by reinforcement learning to
zero, and an evaluation of both. `problems.py` reads the problems, `sizes.py` fits the sizes to the time.
"""

from .problems import MINIATURE, default_problems, name_of
from .recipe import Answers, write

__all__ = ["MINIATURE", "Answers", "default_problems", "name_of", "write"]
