"""A stage's job: everything that it needs to run, independent of the process that runs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.recipe import Problems, Remote, Stage
from ..run_log import RunLog, read
from ..types import Problem, Task
from .dataset_rows import PROBLEMS, ROWS
from .store import MANIFEST, RESPONSES

if TYPE_CHECKING:
    from ..engine.openai_client import Endpoint
    from ..engine.rollout import Engine
    from ..model.decoder import Decoder
    from ..tasks.mixture import Mixture
    from ..text.tokenizer import Tokenizer
    from ..train.checkpoint import Checkpoint

SMALL_MODEL = 10_000_000  # parameters below which the engine decodes SMALL_MODEL_ROWS at once
SMALL_MODEL_ROWS = 256  # rows, enough for wide matrix products
LARGE_MODEL_ROWS = 64  # rows, few enough for the KV cache to stay small


@dataclass(frozen=True)
class Job:
    """One stage to run: settings, seed, complete inputs, and the partial folder to write into.

    `seed` is "0/zero" (recipe seed and stage name): the root of every random draw of the stage. `dropped` are
    the ids of rows and training problems to leave out, being too near to the test. `review_bytes` is the number of
    bytes of the queue's reviews that count.
    """

    name: str
    stage: Stage
    seed: str
    inputs: dict[str, Path]
    problems: dict[str, Problems]
    folder: Path
    control: str | None = None
    queue: Path | None = None
    review_bytes: int | None = None
    endpoints: dict[str, Remote] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    stopping: Callable[[], bool] = field(default=lambda: False, compare=False)

    # ------------------------------------------------------------ models

    def model(self, name: str) -> tuple[Decoder, Tokenizer]:
        """The weights and the tokenizer of an input."""
        from ..model import weights
        from ..text.tokenizer import Tokenizer

        directory = self.inputs[name] / "model"
        return weights.load(directory), Tokenizer.from_directory(directory)

    def endpoint(self, name: str) -> Endpoint:
        """An endpoint that the stage may use; the store caches its responses for all stages and runs."""
        from ..engine.openai_client import Endpoint

        settings = self.stage if isinstance(self.stage, Remote) else self.endpoints[name]
        cache = self.folder.parents[1] / RESPONSES
        return Endpoint(f"stages.{name}", settings, cache, self.stopping)

    def sampler(self, name: str, speculate: bool = False) -> Engine | Endpoint:
        """The engine of an input's model, or an endpoint."""
        from ..engine.rollout import Engine

        if name in self.endpoints:
            return self.endpoint(name)
        decoder, tokenizer = self.model(name)
        small = decoder.config.parameters < SMALL_MODEL
        return Engine(decoder, tokenizer, SMALL_MODEL_ROWS if small else LARGE_MODEL_ROWS, speculate)

    # ------------------------------------------------------------ data

    def task(self, name: str) -> Task:
        """The task of a problem source."""
        from ..tasks.registry import open_task

        return open_task(name, self.problems[name])

    def mixture(self, weights: dict[str, float], rewards: dict[str, float] | None = None) -> Mixture:
        """Problems by weight; the name of a `screen` stage stands for the problems that it kept."""
        from ..tasks.mixture import Mixture

        tasks = {name: self.task(name) for name in self.problems}
        subsets: dict[str, list[Problem]] = {}
        if self.dropped:
            for name, task in tasks.items():
                subsets[name] = self._allowed(task.problems("train"))
        for name in weights:
            if name in self.inputs:
                subsets[name] = self._allowed(read_problems(self.inputs[name] / PROBLEMS))
        return Mixture(tasks, weights, rewards or {"accuracy": 1.0}, subsets)

    def _allowed(self, problems: Iterable[Problem]) -> list[Problem]:
        return [problem for problem in problems if problem.id not in self.dropped]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of an input, without those to leave out."""
        return [row for row in read(self.inputs[name] / ROWS) if row["id"] not in self.dropped]

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of an input."""
        return json.loads((self.inputs[name] / MANIFEST).read_text(encoding="utf-8"))

    # ------------------------------------------------------------ output

    def record(self, step: int = 0, total: int | None = None) -> RunLog:
        """The stage's metrics and rollouts, continued at `step`."""
        return RunLog(self.folder, step, total)

    def checkpoint(self) -> Checkpoint:
        """The stage's checkpoint."""
        from ..train.checkpoint import Checkpoint

        return Checkpoint(self.folder, self.stage.save_every, self.stopping)


def read_problems(path: Path) -> list[Problem]:
    """The problems that a screening kept."""
    problems = []
    for row in read(path):
        row.pop("pass_rate", None)
        problems.append(Problem(**row))
    return problems
