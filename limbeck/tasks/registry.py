"""The kinds of tasks that a recipe can use."""

from __future__ import annotations

from pathlib import Path

from ..config.recipe import Files, Gym, Miniature, Problems, Sums
from ..types import LimbeckError, Task
from .clock_countdown import Countdown
from .files import FileTask
from .gym import GymTask
from .sums import SumTask


def open_task(name: str, settings: Problems, base: Path = Path()) -> Task:
    """Return the task that `settings`, an entry of the recipe's `problems`, describe. `name` is the entry's
    key; paths are relative to `base`."""
    match settings:
        case Miniature():
            return Countdown(name, settings)
        case Gym():
            return GymTask(name, settings)
        case Sums():
            return SumTask(name, settings)
        case Files():
            return FileTask(name, settings, base)
    raise LimbeckError(f"problems.{name}: no such source as {type(settings).__name__}")
