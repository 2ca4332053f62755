"""A job: everything that one stage needs to run, in any process. `worker.py` sends jobs to worker
processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..activity import phase
from ..config.parts import ModelStage
from ..config.recipe import General, Problems, Remote, Stage
from ..run_log import RunLog, read
from ..types import Problem, Task
from .dataset_rows import PROBLEMS, ROWS
from .store import MANIFEST, RESPONSES

if TYPE_CHECKING:
    import torch

    from ..config.hosts import Hosts
    from ..engine.openai_client import Endpoint
    from ..engine.rollout import Engine
    from ..model.decoder import Decoder
    from ..model.lora import LoRA
    from ..tasks.mixture import Mixture
    from ..text.tokenizer import Tokenizer
    from ..train.checkpoint import Checkpoint
    from ..train.learner import Learner

SMALL_MODEL = 10_000_000  # parameters below which the engine decodes SMALL_MODEL_ROWS at once
SMALL_MODEL_ROWS = 256  # rows, enough for wide matrix products
LARGE_MODEL_ROWS = 64  # rows, few enough for the KV cache to stay small


@dataclass(frozen=True)
class Job:
    """One stage to run: its settings, its seed, the folders of its finished inputs, and the folder to write
    into.

    `seed` is, for example, "0/zero" (recipe seed and stage name); all random draws of the stage derive from
    it. `inputs` maps input names to artifact folders. `control` is "forced" for an evaluation that forces
    continuations, "cut" for one that cuts thoughts off, else None. `queue` is the folder of rows under
    review, of whose review file the first `review_bytes` bytes count. `dropped` are the ids of rows and
    training problems to leave out because they are too similar to a test. `continues` is the folder of the
    shorter stage's artifact that the stage is continued from, if there is one (continuation.py); `preview` is
    the file for the preview of the stage, None if there is to be none. `device` is what models are placed on
    (model/ops/devices.py). `hosts` are the settings of the seats that sample and grade, None if this process
    does. `stopping` returns True once the stage should write a checkpoint and end, and
    `tell` shows the user a message.
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
    device: str = "cpu"
    continues: Path | None = None
    preview: Path | None = None
    hosts: Hosts | None = None
    stopping: Callable[[], bool] = field(default=lambda: False, compare=False)
    tell: Callable[[str], None] = field(default=print, compare=False)

    # ------------------------------------------------------------ models

    def model(self, name: str) -> tuple[Decoder, Tokenizer]:
        """Load the model of the input `name`, onto the stage's device and in its precision, and the
        tokenizer."""
        from ..model import weights

        decoder = weights.load(self.inputs[name] / "model", self.dtype)
        return self.place(decoder), self.tokenizer(name)

    def tokenizer(self, name: str) -> Tokenizer:
        """Load the tokenizer of the input `name`."""
        from ..text.tokenizer import Tokenizer

        return Tokenizer.from_directory(self.inputs[name] / "model")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, by the stage's setting `precision`."""
        import torch

        return getattr(torch, getattr(self.stage, "precision", None) or "float32")

    def place(self, decoder: Decoder) -> Decoder:
        """Move a model to the stage's device, in the stage's precision, and return it."""
        from ..model.ops import place

        exact = getattr(self.stage, "exact", None) is not False and not getattr(self.stage, "engine", None)
        return place(decoder, self.device, self.dtype, exact)

    @property
    def needs_device(self) -> bool:
        """True if the stage computes with a model."""
        drawn = isinstance(self.stage, General) and not self.stage.model
        return isinstance(self.stage, ModelStage) and not drawn

    def endpoint(self, name: str) -> Endpoint:
        """Open the remote endpoint `name`. Its responses are cached in the store, for all stages and runs."""
        from ..engine.openai_client import Endpoint

        settings = self.stage if isinstance(self.stage, Remote) else self.endpoints[name]
        cache = self.folder.parents[1] / RESPONSES
        return Endpoint(f"stages.{name}", settings, cache, self.stopping)

    def sampler(self, name: str, speculate: bool = False) -> Engine | Endpoint:
        """Return what samples responses of the input `name`: an endpoint if it is remote, else an inference
        engine with its model. `speculate` turns on speculative decoding."""
        if name in self.endpoints:
            return self.endpoint(name)
        decoder, tokenizer = self.model(name)
        small = decoder.config.parameters < SMALL_MODEL
        return self.engine(decoder, tokenizer, speculate, SMALL_MODEL_ROWS if small else LARGE_MODEL_ROWS)

    def engine(
        self, decoder: Decoder, tokenizer: Tokenizer, speculate: bool = False, rows: int = SMALL_MODEL_ROWS
    ) -> Engine:
        """Return an engine that samples with the weights of `decoder`, at most `rows` sequences at once, or
        on the seats of `hosts`. `speculate` turns on speculative decoding."""
        from ..engine.rollout import Engine

        if self.hosts:
            from .stage_seats import fleet

            return fleet(self, decoder, tokenizer, speculate)
        return Engine(decoder, tokenizer, rows, speculate)

    def learner(self, decoder: Decoder, steps: int, lora: LoRA | None = None) -> Learner:
        """Return a learner that trains `decoder`, or its adapters `lora`, with the stage's optimizer. `steps`
        is the number of updates."""
        from ..train.learner import Learner

        recompute = getattr(self.stage, "recompute", False)
        samples = not getattr(self.stage, "engine", None)
        return Learner(decoder, self.stage.optimizer, steps, recompute, lora, self.seed, samples)

    # ------------------------------------------------------------ data

    def task(self, name: str) -> Task:
        """Open the task (the problems and their checker) of the problem source `name`."""
        from ..tasks.registry import open_task

        return open_task(name, self.problems[name])

    def mixture(self, weights: dict[str, float], rewards: dict[str, float] | None = None) -> Mixture:
        """Return a mixture that draws problems from several sources. `weights` maps sources to sampling
        weights; the name of a `screen` stage stands for the problems that it kept. `rewards` maps the parts
        of a score to their weights in the reward, by default accuracy alone."""
        from ..tasks.mixture import Mixture

        with phase("opening the problems"):
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
        """Return the rows of the input `name`, without those in `dropped`."""
        return [row for row in read(self.inputs[name] / ROWS) if row["id"] not in self.dropped]

    def manifest(self, name: str) -> dict[str, Any]:
        """Read the manifest (settings, costs, notes) of the input `name`."""
        return json.loads((self.inputs[name] / MANIFEST).read_text(encoding="utf-8"))

    # ------------------------------------------------------------ output

    def record(self, step: int = 0, total: int | None = None) -> RunLog:
        """Open the stage's log of metrics and rollouts, to be continued at `step`. `total` is the number of
        steps, if known."""
        return RunLog(self.folder, step, total)

    def checkpoint(self) -> Checkpoint:
        """Return the object that saves and restores the stage's training checkpoint. The final one is saved
        too if a longer stage can be continued from it."""
        from ..train.checkpoint import Checkpoint
        from .continuation import obstacle

        return Checkpoint(self.folder, self.stage.save_every, self.stopping, final=not obstacle(self.stage))


def read_problems(path: Path) -> list[Problem]:
    """Read the problems that a `screen` stage kept from its `problems.jsonl`."""
    problems = []
    for row in read(path):
        row.pop("pass_rate", None)
        problems.append(Problem(**row))
    return problems
