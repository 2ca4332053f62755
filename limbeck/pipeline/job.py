"""What one stage needs in order to run, and nothing of where it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.recipe import Problems, Remote, Stage
from ..run_log import Record, read
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


@dataclass(frozen=True)
class Job:
    """One stage to run: settings, seed, complete inputs, and the partial folder to write into.

    `seed` is "0/zero" (recipe seed and stage name): the root of every random draw of the stage. `dropped` are the ids
    of rows and training problems to leave out, being too near to the test; `said` is how many bytes of the queue's reviews count.
    """

    name: str
    stage: Stage
    seed: str
    inputs: dict[str, Path]
    problems: dict[str, Problems]
    folder: Path
    control: str | None = None
    queue: Path | None = None
    said: int | None = None
    endpoints: dict[str, Remote] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    stopping: Callable[[], bool] = field(default=lambda: False, compare=False)

    def model(self, name: str) -> tuple[Decoder, Tokenizer]:
        """The weights and the tokenizer of an input."""
        from ..model import weights
        from ..text.tokenizer import Tokenizer

        directory = self.inputs[name] / "model"
        return weights.load(directory), Tokenizer.from_directory(directory)

    def endpoint(self, name: str) -> Endpoint:
        """An endpoint that the stage may ask. What it answers is kept beside the artifacts, for all stages and runs."""
        from ..engine.openai_client import Endpoint

        settings = self.stage if isinstance(self.stage, Remote) else self.endpoints[name]
        return Endpoint(f"stages.{name}", settings, self.folder.parents[1] / RESPONSES, self.stopping)

    def sampler(self, name: str, speculate: bool = False) -> Engine | Endpoint:
        """Whoever answers: an input's model, or an endpoint."""
        from ..engine.rollout import Engine

        if name in self.endpoints:
            return self.endpoint(name)
        decoder, tokenizer = self.model(name)
        # enough rows in flight for wide products, few enough for the cache to stay small
        return Engine(decoder, tokenizer, 256 if decoder.config.parameters < 10_000_000 else 64, speculate)

    def task(self, name: str) -> Task:
        from ..tasks.registry import open_task

        return open_task(name, self.problems[name])

    def mixture(self, weights: dict[str, float], rewards: dict[str, float] | None = None) -> Mixture:
        """Problems by weight; a name that is a `screen` stage stands for the problems that it kept."""
        from ..tasks.mixture import Mixture

        tasks = {name: self.task(name) for name in self.problems}
        subsets = {
            name: read_problems(self.inputs[name] / PROBLEMS) for name in weights if name in self.inputs
        }
        if self.dropped:
            subsets = {**{name: task.problems("train") for name, task in tasks.items()}, **subsets}
        subsets = {
            name: [p for p in problems if p.id not in self.dropped] for name, problems in subsets.items()
        }
        return Mixture(tasks, weights, rewards or {"accuracy": 1.0}, subsets)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [row for row in read(self.inputs[name] / ROWS) if row["id"] not in self.dropped]

    def manifest(self, name: str) -> dict[str, Any]:
        return json.loads((self.inputs[name] / MANIFEST).read_text(encoding="utf-8"))

    def record(self, step: int = 0, total: int | None = None) -> Record:
        return Record(self.folder, step, total)

    def checkpoint(self) -> Checkpoint:
        from ..train.checkpoint import Checkpoint

        return Checkpoint(self.folder, self.stage.save_every, self.stopping)


def read_problems(path: Path) -> list[Problem]:
    return [Problem(**{k: v for k, v in row.items() if k != "pass_rate"}) for row in read(path)]
