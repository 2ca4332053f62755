"""The engine for use in Python, which finds its model by name."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from ..engine import rollout
from ..model import weights
from ..pipeline.model_name import find_model
from ..text.tokenizer import Tokenizer


class Engine(rollout.Engine):
    """Samples completions from a decoder, at most `rows` sequences at once.

    `Engine.load("quickstart/r1")` opens a model by its name; the constructor takes one that is open.
    """

    @classmethod
    def load(
        cls, name: str | Path, runs: str | Path = "runs", rows: int = 256, speculate: bool = False
    ) -> Self:
        """Return an engine over the model `name`: a pulled model's name, a model directory, a GGUF file,
        RUN/STAGE, a run, or an artifact. `runs` is the folder of the runs.

        `rows` and `speculate` are those of the constructor. Raises LimbeckError if there is no such model.
        """
        directory = find_model(name, runs).directory()
        return cls(weights.load(directory), Tokenizer.from_directory(directory), rows, speculate)
