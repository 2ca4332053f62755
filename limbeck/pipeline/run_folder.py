"""The files that describe a run, in its folder. They are read without computing a key or loading a model.

runs/NAME/recipe.yaml    the stages, in order
runs/NAME/stages.json    {STAGE: the name of its artifact's folder in runs/store}
runs/NAME/clock.json     {ARTIFACT: [[begin, end], ...]}, when the run worked on it, in Unix time
runs/NAME/forecast.json  {"stages": {STAGE: {"seconds", "low", "high", ...}}}, if a forecast was made
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config.load import load
from ..config.recipe import Load, Recipe
from ..types import LimbeckError
from .store import MANIFEST, Artifact, Store, write

RECIPE = "recipe.yaml"
INDEX = "stages.json"
FORECAST = "forecast.json"
CLOCK = "clock.json"


def run_folders(home: Path) -> list[Path]:
    """Return the folders of all runs in `home`, sorted by name."""
    return sorted(path.parent for path in home.glob(f"*/{RECIPE}") if path.parent.name != "store")


def indexes(home: Path) -> dict[str, dict[str, str]]:
    """Return, for each run in `home`, the names of its finished stages' artifact folders:
    run -> stage -> name."""
    return {path.parent.name: read_json(path) for path in sorted(home.glob(f"*/{INDEX}"))}


def store_of(run: Path) -> Path:
    """Return the folder of the store that the run's artifacts are in."""
    return run.parent / "store"


def read_recipe(run: Path) -> Recipe:
    """Read the recipe of a run. An unchanged file is parsed only once. Raises LimbeckError if it cannot be
    read."""
    path = run / RECIPE
    return _load_recipe(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _load_recipe(path: Path, modified: int) -> Recipe:
    """Parse a recipe file. `modified` is the file's modification time in ns, so that a changed file is not
    read from the cache."""
    return load(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run's folder; {} if it does not exist. Raises LimbeckError if it is not valid
    JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LimbeckError(f"{path}: not valid JSON ({error}); remove it, and run again") from None


def add_interval(run: Path, artifact: str, begin: float, end: float) -> None:
    """Note that the run worked on an artifact, named by its folder, from `begin` to `end` (Unix times)."""
    intervals = read_json(run / CLOCK)
    intervals.setdefault(artifact, []).append([round(begin, 3), round(end, 3)])
    write(run / CLOCK, json.dumps(intervals) + "\n")


def clock_seconds(run: Path, artifacts: Collection[str]) -> float:
    """Return the seconds in which the run worked on any of the artifacts. Stages that ran side by side count
    once; pauses, and stages whose artifacts were there already, do not count."""
    intervals = [
        tuple(one) for name, all_of in read_json(run / CLOCK).items() if name in artifacts for one in all_of
    ]
    seconds = 0.0
    reached = 0.0
    for begin, end in sorted(intervals):
        seconds += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return seconds


def given_models(run: Path, recipe: Recipe) -> dict[str, Artifact]:
    """Return the results of the stages that stand for a model of the store in a run's recipe, by name."""
    store = Store(store_of(run))
    given = {}
    for name, artifact in read_json(run / INDEX).items():
        stage = recipe.stages.get(name)
        if isinstance(stage, Load) and Path(stage.path).parent.name == artifact:
            given[name] = store.open(store.root / artifact)
    return {name: artifact for name, artifact in given.items() if artifact}


def read_manifest(artifact: Path) -> dict[str, Any]:
    """Read the manifest in an artifact's folder; {} if it was deleted or is not valid JSON (`limbeck verify`
    finds such artifacts). An unchanged file is parsed only once."""
    path = artifact / MANIFEST
    try:
        return _parse(path, path.stat().st_mtime_ns)
    except (FileNotFoundError, ValueError):
        return {}


@lru_cache(maxsize=2048)
def _parse(path: Path, modified: int) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
