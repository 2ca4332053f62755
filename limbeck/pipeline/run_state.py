"""The state of a run, read from the files in its folder. No key is computed and no model is loaded.

`run_folder.py` and `run_status.py` describe the files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.recipe import Curate, Recipe, Stage
from ..report.loaded_run import StageView
from . import run_status
from .graph import Node, nodes_of, report_nodes
from .review import review_queue
from .run_folder import FORECAST, INDEX, RECIPE, read_json, read_manifest, read_recipe, run_folders, store_of


@dataclass(frozen=True)
class StageState:
    """The state of one stage:
    `StageState("zero", stage, ("base",), "begun", Path("store/.partial/rl-3fa9…"))`.

    `inputs` are the names of the stages that it reads. `state` is `done`, `begun`, `asks` (people must review
    its rows) or `waits`. `folder` has its metrics and result files, None if there are none yet. `open_rows`
    is the number of rows still to review.
    """

    name: str
    stage: Stage
    inputs: tuple[str, ...]
    state: str
    folder: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    open_rows: int = 0

    @property
    def kind(self) -> str:
        """The kind of the stage, such as `rl`."""
        return self.stage.kind

    @property
    def view(self) -> StageView:
        """The stage in the form that the report reads."""
        return StageView(self.name, self.kind, self.stage.title, self.folder, self.manifest, self.inputs)


@dataclass(frozen=True)
class RunState:
    """A run: its recipe, its stages in an order in which they can run, and `foreseen`, the forecast of each
    stage (`seconds`, `low`, `high`) by name, if one was made."""

    folder: Path
    recipe: Recipe
    stages: tuple[StageState, ...]
    foreseen: dict[str, dict[str, float]]

    def stage(self, name: str) -> StageState | None:
        """Return the stage named `name`, None if there is none."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def done(self) -> int:
        """The number of finished stages."""
        return sum(stage.state == "done" for stage in self.stages)

    @property
    def complete(self) -> bool:
        """True if all stages are finished."""
        return self.done == len(self.stages)


def list_runs(home: Path) -> list[Path]:
    """Return the folders of the runs in `home`, the most recently changed one first."""
    return sorted(run_folders(home), key=last_change, reverse=True)


def last_change(run: Path) -> float:
    """Return the latest modification time of the files that describe a run (Unix time in seconds)."""
    files = [run / name for name in (RECIPE, run_status.STATUS, INDEX)]
    return max(path.stat().st_mtime for path in files if path.exists())


def look(folder: Path) -> RunState:
    """Read the state of the run in `folder` from its files. Raises LimbeckError if its recipe cannot be
    read."""
    recipe = read_recipe(folder)
    begun = run_status.status(folder).begun
    finished = read_json(folder / INDEX)
    store = store_of(folder)
    stages: dict[str, StageState] = {}
    for node in nodes_of(recipe):
        artifact = store / finished[node.name] if node.name in finished else None
        manifest = read_manifest(artifact) if artifact else {}
        if manifest:
            state = StageState(node.name, node.stage, node.inputs, "done", artifact, manifest)
        elif node.name in begun:
            partial = store / ".partial" / begun[node.name]
            state = StageState(node.name, node.stage, node.inputs, "begun", partial)
        else:
            state = _waiting(node, stages, store)
        stages[node.name] = state
    for name, stage in report_nodes(recipe):
        stages[name] = _report(name, stage, folder / name)
    forecast = read_json(folder / FORECAST).get("stages", {})
    return RunState(folder, recipe, tuple(stages.values()), forecast)


def _waiting(node: Node, stages: dict[str, StageState], store: Path) -> StageState:
    """Return the state of a stage that has not begun: `asks` if it is a curate stage whose rows are there and
    need reviews, else `waits`. `stages` are the states of the stages before it."""
    stage = node.stage
    if isinstance(stage, Curate) and not stage.auto and stages[stage.rows].state == "done":
        queue = review_queue.queue_folder(store, stages[stage.rows].manifest["digest"])
        open_rows = len(review_queue.pending(queue))
        if open_rows:
            return StageState(node.name, stage, node.inputs, "asks", open_rows=open_rows)
    return StageState(node.name, stage, node.inputs, "waits")


def _report(name: str, stage: Stage, folder: Path) -> StageState:
    """Return the state of a report stage, whose page is in `folder` once it is done."""
    if (folder / "index.html").exists():
        return StageState(name, stage, (), "done", folder)
    return StageState(name, stage, (), "waits")
