"""A run as it stands, read from its folder alone: no key is computed, no model opened.

runs/NAME/recipe.yaml    the stages, in order
runs/NAME/stages.json    which artifact is which stage's
runs/NAME/status.json    what was begun (pipeline/run_status.py)
runs/NAME/forecast.json  what was foreseen, where somebody did: {"stages": {STAGE: {"seconds", "low", "high", ...}}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config.load import load
from ..config.recipe import Curate, Recipe, Stage
from ..report.loaded_run import StageView
from ..types import LimbeckError
from . import run_status
from .graph import nodes_of, report_nodes
from .review import reviews
from .run import FORECAST
from .store import MANIFEST


@dataclass(frozen=True)
class Standing:
    """One stage: `Standing("zero", stage, ("base",), "begun", Path("store/.partial/rl-3fa9…"))`.

    `state` is done, begun, asks (people), or waits. `folder` holds its record and its files, None where there are none.
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
        return self.stage.kind

    @property
    def view(self) -> StageView:
        """As the report reads it."""
        return StageView(self.name, self.kind, self.stage.title, self.folder, self.manifest, self.inputs)


@dataclass(frozen=True)
class Overview:
    """A run's folder: the recipe, its stages in the order in which they can run, and what was foreseen of each."""

    folder: Path
    recipe: Recipe
    stages: tuple[Standing, ...]
    foreseen: dict[str, dict[str, float]]

    def stage(self, name: str) -> Standing | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def done(self) -> int:
        return sum(stage.state == "done" for stage in self.stages)

    @property
    def complete(self) -> bool:
        return self.done == len(self.stages)


def runs_in(home: Path) -> list[Path]:
    """The runs in a folder, the one that was touched last first."""
    found = [path.parent for path in home.glob("*/recipe.yaml") if path.parent.name != "store"]
    return sorted(found, key=_touched, reverse=True)


def _touched(folder: Path) -> float:
    return max(
        path.stat().st_mtime
        for path in (folder / "recipe.yaml", folder / run_status.STATUS, folder / "stages.json")
        if path.exists()
    )


def look(folder: Path) -> Overview:
    """The run in a folder; LimbeckError where its recipe cannot be read."""
    path = folder / "recipe.yaml"
    recipe = _recipe(path, path.stat().st_mtime_ns)
    store, begun, made = (
        folder.parent / "store",
        run_status.status(folder).begun,
        _json(folder / "stages.json"),
    )
    stages: dict[str, Standing] = {}
    for node in nodes_of(recipe):
        artifact = store / made[node.name] if node.name in made else None
        manifest = _manifest(artifact) if artifact else {}
        if manifest:
            stages[node.name] = Standing(node.name, node.stage, node.inputs, "done", artifact, manifest)
        elif node.name in begun:
            stages[node.name] = Standing(
                node.name, node.stage, node.inputs, "begun", store / ".partial" / begun[node.name]
            )
        else:
            stages[node.name] = _waiting(node.name, node.stage, node.inputs, stages, store)
    for name, stage in report_nodes(recipe):
        written = (folder / name / "index.html").exists()
        stages[name] = Standing(
            name, stage, (), "done" if written else "waits", folder / name if written else None
        )
    return Overview(folder, recipe, tuple(stages.values()), _json(folder / FORECAST).get("stages", {}))


def _waiting(
    name: str, stage: Stage, inputs: Sequence[str], stages: dict[str, Standing], store: Path
) -> Standing:
    if isinstance(stage, Curate) and not stage.auto and stages[stage.rows].state == "done":
        queue = store / ".queues" / stages[stage.rows].manifest["digest"][:16]
        if rows := len(reviews.pending(queue)):
            return Standing(name, stage, tuple(inputs), "asks", None, {}, rows)
    return Standing(name, stage, tuple(inputs), "waits")


@lru_cache(maxsize=64)
def _recipe(path: Path, changed: int) -> Recipe:
    return load(path)


def _manifest(artifact: Path) -> dict[str, Any]:
    try:
        return _parsed(artifact / MANIFEST, (artifact / MANIFEST).stat().st_mtime_ns)
    except (FileNotFoundError, ValueError):  # deleted since, or damaged: `limbeck verify` tells
        return {}


@lru_cache(maxsize=2048)
def _parsed(path: Path, changed: int) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LimbeckError(f"{path}: not valid JSON ({error}); remove it, and run again") from None
