"""The results of a run for use in Python: stages, artifacts, models, metrics and evaluations as rows.

A row is a dict of plain values, so `pandas.DataFrame(run.metrics)` is a table. Everything is read from the
files of the run's folder; no model is loaded before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipeline import run_state, run_status
from ..pipeline.dataset_rows import ROWS
from ..pipeline.run_folder import RECIPE, read_json
from ..report.loaded_run import EVALUATION
from ..run_log import read, read_metrics
from ..serve import jobs
from ..types import LimbeckError

if TYPE_CHECKING:
    from ..config.recipe import Recipe
    from .engine import Engine


@dataclass(frozen=True)
class StageResult:
    """One stage of a run: `StageResult("zero", "rl", "done", Path("runs/store/rl-3fa9..."), {...})`.

    `state` is `done`, `begun`, `asks` (people must review its rows) or `waits`. `folder` is the artifact of a
    finished stage or the folder of one that has begun, None before. `manifest` describes the artifact; it is
    empty until the stage is done.
    """

    name: str
    kind: str
    state: str
    folder: Path | None
    manifest: dict[str, Any] = field(repr=False)

    @property
    def model_folder(self) -> Path | None:
        """The directory of the model that the stage has made, in HuggingFace's format; None without one."""
        directory = self.folder / "model" if self.folder and self.state == "done" else None
        return directory if directory and directory.is_dir() else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of the stage's metrics, one for each logged step so far."""
        return read_metrics(self.folder) if self.folder else []

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The training examples that the stage has made; none for a stage that makes a model."""
        return list(read(self.folder / ROWS)) if self.folder else []

    @property
    def evaluation(self) -> dict[str, Any]:
        """The result of an evaluation, as `evaluation.json` holds it; empty for other stages."""
        return read_json(self.folder / EVALUATION) if self.folder else {}

    def model(self, rows: int = 256) -> Engine:
        """Return an engine over the stage's model, which samples at most `rows` sequences at once.

        Raises LimbeckError if the stage makes no model, or has not made it yet.
        """
        from .engine import Engine

        if self.model_folder is None:
            why = "it makes none" if self.state == "done" else f"it is not done (its state is {self.state})"
            raise LimbeckError(f"stage {self.name} has no model: {why}; `run.models` lists the models")
        return Engine.load(self.model_folder, rows=rows)


class Run:
    """What a run has made up to now: `Run("runs/quickstart")`. `run["r1"]` is one of its stages.

    Raises LimbeckError if the folder holds no run, or if its recipe cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / RECIPE).exists():
            raise LimbeckError(f"{folder} is no run: it has no {RECIPE}; `limbeck.run` makes one")
        self._state = run_state.look(self.folder)

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run carries out, with every setting."""
        return self._state.recipe

    @property
    def state(self) -> str:
        """The state of the run now: `running`, `pausing`, `paused`, `waits` (for reviews), `finished` or
        `failed`, which it is too if its process died."""
        return jobs.state(self.folder).name

    @cached_property
    def stages(self) -> dict[str, StageResult]:
        """All stages by name, in an order in which they can run."""
        return {
            stage.name: StageResult(stage.name, stage.kind, stage.state, stage.folder, stage.manifest)
            for stage in self._state.stages
        }

    @property
    def artifacts(self) -> dict[str, Path]:
        """The folder of each finished stage, by the stage's name."""
        done = (stage for stage in self.stages.values() if stage.state == "done")
        return {stage.name: stage.folder for stage in done}

    @property
    def models(self) -> dict[str, Path]:
        """The directory of each model, by the name of the stage that made it; transformers can load it."""
        directories = {name: stage.model_folder for name, stage in self.stages.items()}
        return {name: directory for name, directory in directories.items() if directory}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of all stages: one row for each logged step, with `stage`, `step` and the metrics of
        the report."""
        stages = self.stages.values()
        return [{"stage": stage.name, **row} for stage in stages for row in stage.metrics]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The accuracies of all evaluations: one row for each model, source of problems and mode, with the
        mean and its interval (`low`, `high`) as shares from 0 to 1."""
        return [row for stage in self.stages.values() for row in _accuracies(stage)]

    @property
    def report(self) -> Path | None:
        """The page of the report; None if there is none."""
        pages = (folder / "index.html" for name, folder in self.artifacts.items())
        return next((page for page in pages if page.exists()), None)

    def pause(self) -> None:
        """Ask the process or thread that executes the run to write checkpoints and stop; returns at once."""
        run_status.request_pause(self.folder)

    def __getitem__(self, name: str) -> StageResult:
        """Return the stage called `name`. Raises LimbeckError if there is none."""
        if name not in self.stages:
            raise LimbeckError(f"{self.folder} has no stage {name}; it has {', '.join(self.stages)}")
        return self.stages[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the stages."""
        return iter(self.stages)

    def __repr__(self) -> str:
        """Return the run in one line: `Run('runs/quickstart', 23 of 23 stages done)`."""
        return f"Run({str(self.folder)!r}, {self._state.done} of {len(self.stages)} stages done)"


def _accuracies(stage: StageResult) -> Iterator[dict[str, Any]]:
    """Yield the accuracies of an evaluation, one row for each source of problems and mode."""
    evaluation = stage.evaluation
    for source, measured in evaluation.get("sources", {}).items():
        for mode, entry in measured["modes"].items():
            interval = {key: entry["accuracy"][key] for key in ("mean", "low", "high")}
            model = {"stage": stage.name, "model": evaluation["model"]}
            yield {**model, "source": source, "mode": mode, **interval}
