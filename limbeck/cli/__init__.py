"""The command line: `limbeck COMMAND`."""

from .application import app, main
from .run import run

__all__ = ["app", "main", "run"]
