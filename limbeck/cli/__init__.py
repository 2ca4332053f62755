"""The command line `limbeck COMMAND`: one module for each group of commands, and the modules that they
share.
"""

from .application import app, main
from .run import run

__all__ = ["app", "main", "run"]
