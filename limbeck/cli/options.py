"""Options that several commands share, and functions that open what a command's arguments name and print its
results.

A store holds the artifacts (folders with the results of finished stages) of all runs in one folder. A graph
is a recipe's stages with their inputs and artifacts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..config.recipe import Recipe
    from ..model.config import ModelConfig
    from ..pipeline.graph import Graph
    from ..pipeline.model_name import NamedModel
    from ..pipeline.store import Store
    from ..types import LimbeckError

Home = Annotated[Path, typer.Option("--runs", help="where runs and their artifacts live")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable, on standard output")]
Auto = Annotated[bool, typer.Option("--auto", help="let each curate stage's policy decide instead of people")]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:1|mps",
        help="what computes; `auto` is a card if torch sees one",
    ),
]
RUNS = Path("runs")


def run_folder(name: str) -> Path:
    """Return the folder of a run: `name` itself, or the folder of that name in `runs`."""
    path = Path(name)
    return path if len(path.parts) > 1 or path.exists() else RUNS / name


RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", parser=run_folder, help="a run's folder or its name in runs")
]
MODEL = (
    "a model: a pulled name, a directory, a GGUF file, RUN/STAGE, a run, a stage's name, "
    "or the beginning of an artifact's name (docs/reference/models.md)"
)
STATES = {"cached": "done", "running": "running", "ready": "will run", "waits": "waits", "asks": "asks you"}


def usage_error(message: str) -> LimbeckError:
    """Return (not raise) the exception for a mistake in a command's arguments; the command then ends with
    exit code 2.
    """
    from ..types import LimbeckError

    return LimbeckError(message)


def open_store(runs: Path) -> Store:
    """Return the store of artifacts in the folder `runs`.

    Raises a usage error if nothing has been run there.
    """
    from ..pipeline.store import Store

    if not (runs / "store").exists():
        raise usage_error(f"{runs}/store does not exist; nothing has been run there yet")
    return Store(runs / "store")


def open_model(name: str, runs: Path) -> NamedModel:
    """Return the model that the argument MODEL of a command names, and say on standard error which one it is
    if that is the name of a run.

    Raises a usage error for a name that stands for no model, or for several.
    """
    from ..pipeline.model_name import find_model

    model = find_model(name, runs)
    if model.run:
        print(f"{name}: its model {model.title}", file=sys.stderr)
    return model


def tell(text: str) -> None:
    """Print a message to the user on standard error."""
    print(f"limbeck: {text}", file=sys.stderr, flush=True)


@contextmanager
def hold_device(device: str, owner: str) -> Iterator[str]:
    """Hold the device of a command, alone if it is a card, and yield its resolved name. While another process
    computes on the card, the command waits and says for whom; `owner` is what is said to those that wait for
    this one.

    Raises LimbeckError if there is no such device here.
    """
    from ..model.ops import devices
    from ..runtime.card_lock import device_lock

    name = devices.resolve(device)
    with device_lock(name, owner, tell):
        yield name


def read_config(path: Path) -> ModelConfig:
    """Return the configuration of a model directory, a config.json or a GGUF file."""
    from ..model.config import ModelConfig

    if path.suffix != ".gguf" or path.is_dir():
        return ModelConfig.from_directory(path)
    from ..model import gguf

    return gguf.read_config(path)


def find_recipe(recipe: str | Path) -> Path:
    """Return the path of a recipe's YAML file.

    `recipe` is that path, or the name of a recipe that comes with Limbeck.
    """
    from ..config.load import find

    return find(recipe)


def load_recipe(path: Path, overrides: list[str], auto: bool) -> Recipe:
    """Return the recipe in a YAML file, with settings replaced by the `key.path=value` texts in
    `overrides`.

    With `auto`, curate stages are decided by their policies instead of by people.
    """
    from ..config.load import load, with_auto_curation

    recipe = load(path, overrides)
    return with_auto_curation(recipe) if auto else recipe


def open_graph(recipe: Recipe, path: Path, runs: Path, need_files: bool = True) -> Graph:
    """Return the graph of a recipe's stages, with the artifacts that the folder `runs` already holds.

    `path` is the recipe's file; relative paths in the recipe start at its folder. The files and models that
    the recipe names have to be here, unless `need_files` is False.
    """
    from ..pipeline.graph import Graph
    from ..pipeline.run_folder import given_models
    from ..pipeline.store import Store

    given = given_models(path.parent, recipe)
    return Graph(recipe, Store(runs / "store"), path.parent, need_files, given)


def open_run(folder: Path) -> Graph:
    """Return the graph of the run in `folder`, read from its recipe.yaml.

    Raises a usage error if the folder has none.
    """
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        raise usage_error(f"{folder} is no run: it has no recipe.yaml; runs begin with `limbeck run`")
    return open_graph(load_recipe(recipe, [], False), recipe, folder.parent)


def print_json(data: Any, **more: Any) -> None:
    """Print a command's result as one line of JSON, for programs, with `more` as its further fields."""
    print(json.dumps({"schema": 1, "ok": True, "data": data, **more}, ensure_ascii=False))


def print_rows(rows: list[dict[str, Any]], as_json: bool, line: Callable[[dict[str, Any]], str]) -> None:
    """Print the rows of a table.

    With `as_json` they are printed as one JSON result, else each as the text that `line` returns for it.
    """
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print(line(row).rstrip())
