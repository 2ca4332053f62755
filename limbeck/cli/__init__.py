"""The command line: `limbeck COMMAND`."""

from .commands import app, main, run

__all__ = ["app", "main", "run"]
