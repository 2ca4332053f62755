"""Deletion of a run: what it frees, what other runs keep, and which models it takes away."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config.recipe import Load
from ..types import LimbeckError
from . import run_status
from .run_folder import INDEX, read_json, read_recipe, run_folders, store_of
from .store import Store


@dataclass(frozen=True)
class Deletion:
    """What the deletion of a run means, before it is done.

    `freed` maps the folders and files that are deleted to their sizes in bytes: the run's own folder, the
    artifacts that no other run uses, with their final checkpoints, and what unfinished stages have written.
    `shared` maps the names of other runs to the stages whose artifacts stay because these runs use them, too.
    `models` are the stages whose models go away, `served` the names of served models among them. `dependent`
    are the runs whose recipes load such a model.
    """

    run: Path
    freed: dict[Path, int]
    shared: dict[tuple[str, ...], list[str]]
    models: tuple[str, ...]
    served: tuple[str, ...]
    dependent: tuple[str, ...]

    @property
    def size(self) -> int:
        """The bytes that are freed."""
        return sum(self.freed.values())


def foresee(run: Path, served: Mapping[str, Path] | None = None) -> Deletion:
    """Return what the deletion of a run would do, and change nothing. `served` maps the names of the served
    models to their directories."""
    store = Store(store_of(run))
    users = _users(run)
    owned: dict[str, Path] = {}
    shared: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for stage, name in read_json(run / INDEX).items():
        if name in users:
            shared[users[name]].append(stage)
        elif _is_name(name):
            owned[stage] = store.root / name
    begun = run_status.status(run).begun.values()
    partial = [store.root / ".partial" / name for name in begun if _is_name(name) and name not in users]
    folders = dict.fromkeys([run, *owned.values(), *partial])
    freed = {folder: store.size(folder) for folder in folders if folder.is_dir()}
    ends = [store.checkpoint(folder) for folder in owned.values()]
    freed |= {path: path.stat().st_size for path in ends if path.exists()}
    models = {stage: folder / "model" for stage, folder in owned.items() if (folder / "model").is_dir()}
    gone = _served_from(models.values(), served or {})
    return Deletion(run, freed, dict(shared), tuple(models), gone, tuple(_loading(run, freed)))


def _is_name(name: str) -> bool:
    """Return True for the name of a folder, False for a path that could lead out of the store."""
    return Path(name).name == name and name not in ("", ".", "..") and not name.startswith(".")


def _served_from(directories: Iterable[Path], served: Mapping[str, Path]) -> tuple[str, ...]:
    """Return the names of the served models that are in one of the directories."""
    gone = {directory.resolve() for directory in directories}
    return tuple(name for name, directory in served.items() if directory.resolve() in gone)


def delete(run: Path) -> Deletion:
    """Delete a run with everything that no other run uses, and return what was deleted. Reviews and responses
    of remote models stay in the store.

    Raises LimbeckError if a process executes the run.
    """
    if run_status.is_running(run):
        raise LimbeckError(f"{run} is being carried out; pause it first, then delete it")
    deletion = foresee(run)
    for path in deletion.freed:  # the run's own comes first: if this is cut off, `limbeck gc` does the rest
        _remove(path)
    return deletion


def _remove(path: Path) -> None:
    """Delete a file or a folder; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _users(run: Path) -> dict[str, tuple[str, ...]]:
    """Return the names of the other runs that use an artifact or an unfinished stage, by the folder's
    name."""
    users: dict[str, tuple[str, ...]] = {}
    for other in _others(run):
        used = [*read_json(other / INDEX).values(), *run_status.status(other).begun.values()]
        for folder in dict.fromkeys(used):
            users[folder] = (*users.get(folder, ()), other.name)
    return users


def _others(run: Path) -> Iterable[Path]:
    """Return the folders of the other runs beside a run."""
    return (other for other in run_folders(run.parent) if other != run)


def _loading(run: Path, freed: Iterable[Path]) -> Iterable[str]:
    """Yield the names of the other runs whose recipes load a model from a folder that is freed."""
    folders = [folder.resolve() for folder in freed]
    for other in _others(run):
        try:
            stages = read_recipe(other).stages.values()
        except LimbeckError:
            continue
        paths = [(other / stage.path).resolve() for stage in stages if isinstance(stage, Load)]
        if any(path.is_relative_to(folder) for path in paths for folder in folders):
            yield other.name
