"""Limbeck: the DeepSeek-R1 recipe end to end, from a base model to a small distilled one, on hardware you
own.

The public names: `run`, `Run` and `Recipe` for whole recipes; `Engine`, `Learner` and `Task`, with the values
that they exchange, for loops of one's own; `LimbeckError` for everything that a user can resolve.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Completion": "limbeck.types",
    "Engine": "limbeck.api.engine",
    "Learner": "limbeck.train.learner",
    "LimbeckError": "limbeck.types",
    "Problem": "limbeck.types",
    "Recipe": "limbeck.config.recipe",
    "Resumable": "limbeck.types",
    "Run": "limbeck.api.results",
    "SamplingParams": "limbeck.engine.sampling",
    "Score": "limbeck.types",
    "Task": "limbeck.types",
    "run": "limbeck.api.run",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # what needs torch is imported when it is asked for, so that `limbeck --help` is not
    if name not in _HOMES:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
