"""Model names: the one search for the model that a command's or a function's argument names.

A name is a pulled model's name, a directory, a GGUF file, RUN/STAGE, a run, a stage's name, or the beginning
of an artifact's name. docs/reference/models.md, "Naming a model", lists the forms. Does not import torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from ..config.aliases import current_kind
from ..eval.statistics import difference
from ..model.find import MODELS_FOLDER, pull_command, pulled_folder
from ..plan.models import published
from ..report import loaded_run
from ..types import LimbeckError
from .run_folder import INDEX, RECIPE, indexes, read_json, read_manifest, read_recipe, store_of
from .store import MANIFEST, Artifact, Store

RELEASED = "lineage.json"  # in a released directory
CONFIG = "config.json"  # in a model directory
WEIGHTS = "model"  # an artifact's subfolder that is a model directory
STORY = ("base", "zero", "dev1", "dev2", "dev3", "r1")  # roles of a run's model, the end of the story last
FINAL_STAGE = "r1"  # the final model of a run without a story
LISTED = 8  # names that an error lists
MAX_SHOWN = 200  # characters of a name that an error repeats
PAGE = "docs/reference/models.md tells how to name a model"

# Directories of unpacked GGUF files, held until the process ends: each is removed with its object.
_UNPACKED: list[tempfile.TemporaryDirectory] = []


@dataclass(frozen=True)
class NamedModel:
    """What a name stands for: `NamedModel("r1", Path("runs/store/rl-3fa9.../model"), artifact)`.

    `title` is a short name: that of the stage, the directory or the file. `path` is a model directory or a
    GGUF file, None for an artifact without a model. `artifact` is the stage's result, None for a model that
    no stage made. `run` is the run's folder if a run was named.
    """

    title: str
    path: Path | None
    artifact: Artifact | None = None
    run: Path | None = None

    @property
    def store(self) -> Store | None:
        """The store that the artifact is in, None for a model that no stage made."""
        return Store(self.artifact.folder.parent) if self.artifact else None

    def directory(self) -> Path:
        """Return the model directory. A GGUF file is converted to one, which is deleted when the process
        ends.

        Raises LimbeckError if a GGUF file cannot be read.
        """
        if self.path.is_dir():
            return self.path
        from ..model import gguf

        folder = tempfile.TemporaryDirectory(prefix="limbeck-gguf-")
        _UNPACKED.append(folder)
        directory = Path(folder.name) / WEIGHTS
        gguf.read(self.path, directory)
        return directory


class UnknownModel(LimbeckError):
    """A name that stands for nothing."""


class _Meaning(NamedTuple):
    """One thing that a name may mean: `_Meaning("run", "runs/quickstart", model)`.

    `written` is the name that means this thing only. `model` is None for a run that has no model yet.
    """

    what: str
    written: str
    model: NamedModel | None


def find_model(name: str | Path, runs: str | Path = "runs") -> NamedModel:
    """Return the model that `name` stands for; its `path` is not None. `runs` is the folder of the runs.

    Raises LimbeckError for a name that means nothing, several things, or an artifact without a model.
    """
    model = find(name, runs)
    if model.path is None:
        raise LimbeckError(
            f"{name} is {_a(model.artifact.kind)} stage, which has no model; "
            f"{_listing(str(name), Path(runs))}"
        )
    return model


def find_artifact(name: str | Path, runs: str | Path = "runs") -> tuple[Artifact, Store]:
    """Return the artifact that `name` stands for, and its store.

    Raises LimbeckError for a name that means nothing, several things, or a model that no stage made.
    """
    model = find(name, runs)
    if model.artifact is None:
        raise LimbeckError(
            f"{name} is a model that no stage of a run made; run a recipe that loads it (kind: load), and "
            "name RUN/STAGE"
        )
    return model.artifact, model.store


def find(name: str | Path, runs: str | Path = "runs", others: Iterable[str] = ()) -> NamedModel:
    """Return what `name` stands for: a model, or any stage's artifact.

    Raises LimbeckError, which lists the possible names, unless it stands for exactly one thing; it is
    `UnknownModel` if it stands for nothing. `others` are names that the caller knows, listed as well.
    """
    name = str(name)
    runs = Path(runs)
    meanings = _exact(name, runs) or list(_abbreviated(name, runs))
    made = [meaning for meaning in meanings if meaning.model]
    if meanings and not made:
        run = meanings[0].written
        raise LimbeckError(f"{run} has no model yet; `limbeck status {run}` says how far it is")
    if len(made) > 1:
        choices = [f"{meaning.written} ({meaning.what})" for meaning in made]
        raise LimbeckError(f"{name} is {len(made)} things; write one of {_joined(choices)}; {PAGE}")
    if not made:
        raise UnknownModel(_unknown(name, runs, others))
    return made[0].model


# ---------------------------------------------------------------- meanings of a name


def _exact(name: str, runs: Path) -> list[_Meaning]:
    """Return the things that are called exactly `name`, without those that are another one's model."""
    if not name:
        return []
    places = {name if os.sep in name else f"./{name}": Path(name)}
    if not name.startswith(("/", "./", "../")):
        pulled = pulled_folder(name)
        places |= {str(path): path for path in (pulled, runs / name)}
    meanings = [_look(written, path) for written, path in places.items()]
    meanings += _stages_called(name, runs)
    distinct: dict[Path | str, _Meaning] = {}
    for meaning in filter(None, meanings):
        distinct.setdefault(_identity(meaning), meaning)
    return list(distinct.values())


def _identity(meaning: _Meaning) -> Path | str:
    """Return what is equal for two meanings with the same model: the path of its artifact or its files."""
    if meaning.model is None:
        return meaning.written
    artifact = meaning.model.artifact
    return (artifact.folder if artifact else meaning.model.path).resolve()


def _look(written: str, path: Path) -> _Meaning | None:
    """Return what is at a path, or at a path RUN/STAGE; None if that is no model, run or artifact."""
    folder = path.resolve().parent if path.name == WEIGHTS else path
    if _is_file(folder / MANIFEST):
        return _Meaning("artifact", written, _opened(folder.resolve()))
    if path.suffix == ".gguf" and _is_file(path):
        return _Meaning("GGUF file", written, NamedModel(path.stem, path))
    if _is_file(path / CONFIG) or _is_file(path / RELEASED):
        what = "pulled model" if path.parent == MODELS_FOLDER else "directory"
        return _Meaning(what, written, NamedModel(path.name or path.resolve().name, path))
    if _is_run(path):
        return _Meaning("run", written, _model_of(path))
    return _stage_at(written, path)


def _model_of(run: Path) -> NamedModel | None:
    """Return the model that a run stands for, None if it has none yet."""
    stage = final_stage(run)
    model = _stage_of(run, stage) if stage else None
    return replace(model, run=run) if model else None


def _stage_at(written: str, path: Path) -> _Meaning | None:
    """Return the finished stage at a path RUN/STAGE, None if there is none."""
    run = _run_around(path)
    if run is None:
        return None
    stage = path.relative_to(run).as_posix()
    model = _stage_of(run, stage) if stage in read_json(run / INDEX) else None
    return _Meaning("stage", written, model) if model else None


def _stages_called(name: str, runs: Path) -> list[_Meaning]:
    """Return the stages called `name` in the runs of the folder `runs`."""
    meanings = []
    for run, stages in indexes(runs).items():
        if name in stages:
            model = _stage_of(runs / run, name)
            if model:
                meanings.append(_Meaning("stage", str(runs / run / name), model))
    return meanings


def _abbreviated(name: str, runs: Path) -> Iterator[_Meaning]:
    """Yield the artifacts whose folder's name or key begins with `name`."""
    if not name:
        return
    for artifact in Store(runs / "store").all():
        if artifact.folder.name.startswith(name) or artifact.manifest["key"].startswith(name):
            yield _Meaning(artifact.manifest["stage"], artifact.folder.name, _opened(artifact.folder))


def _stage_of(run: Path, stage: str) -> NamedModel | None:
    """Return a finished stage's artifact with its model, None if the artifact was deleted."""
    return _opened(store_of(run.resolve()) / read_json(run / INDEX)[stage])


def _opened(folder: Path) -> NamedModel | None:
    """Return the artifact in a folder with its model, None if it is not there."""
    artifact = Store(folder.parent).open(folder)
    if artifact is None:
        return None
    path = folder / WEIGHTS
    return NamedModel(artifact.manifest["stage"], path if _is_file(path / CONFIG) else None, artifact)


def _is_run(path: Path) -> bool:
    """Return True if `path` is the folder of a run."""
    return _is_file(path / INDEX) or _is_file(path / RECIPE)


def _run_around(path: Path) -> Path | None:
    """Return the run whose folder a path RUN/STAGE begins with; a stage's name may contain a slash."""
    return next((folder for folder in path.parents if _is_file(folder / INDEX)), None)


def _is_file(path: Path) -> bool:
    """Return True if there is a file; False also for names that no file can have."""
    return os.path.isfile(path)


# ---------------------------------------------------------------- the model of a run


def final_stage(run: Path) -> str | None:
    """Return the stage whose model a run stands for; None if the run has no model yet.

    It is the last one of the story in the recipe's report stage (base, zero, dev1, dev2, dev3, r1), unless
    the report's evaluation finds an earlier one to be better: at temperature 1 on the headline problems, with
    the whole 95 % interval of the difference above zero. Of several better ones it is the one with the
    highest accuracy. A run without a story stands for its stage r1, else for the last model that it trained,
    else for the last one that it loaded.
    """
    views = _finished(run)
    models = [view.name for view in views if _is_file(view.folder / WEIGHTS / CONFIG)]
    if _is_file(run / RECIPE):
        told = loaded_run.Run(views, read_recipe(run).model_dump(mode="json"), {})
        story = [told.cast[role] for role in STORY if told.cast.get(role) in models]
        if story:
            return _best(told, story)
    if FINAL_STAGE in models:
        return FINAL_STAGE
    trained = [view.name for view in views if view.name in models and view.kind != "load"]
    return next(reversed(trained or models), None)


def _best(run: loaded_run.Run, story: list[str]) -> str:
    """Return the last model of the story, or one that was measured to be better than it."""
    final = run.accuracy(story[-1])
    best = story[-1]
    for model in story:
        accuracy = run.accuracy(model)
        if not final or not accuracy or difference(accuracy, final)[1] <= 0:
            continue
        if accuracy.mean > run.accuracy(best).mean:
            best = model
    return best


def _finished(run: Path) -> tuple[loaded_run.StageView, ...]:
    """Return the finished stages of a run, in the order of its index."""
    store = store_of(run.resolve())
    views = []
    for stage, name in read_json(run / INDEX).items():
        manifest = read_manifest(store / name)
        if manifest:
            kind = current_kind(manifest["kind"])
            views.append(loaded_run.StageView(stage, kind, "", store / name, manifest, ()))
    return tuple(views)


# ---------------------------------------------------------------- names that there are


def names(runs: Path) -> Iterator[str]:
    """Yield the names of models that there are: pulled ones, runs, RUN/STAGE."""
    for folder in sorted(MODELS_FOLDER.glob("*")):
        if _is_file(folder / CONFIG) or folder.suffix == ".gguf":
            yield folder.name
    for run in indexes(runs):
        models = [view.name for view in _finished(runs / run) if _is_file(view.folder / WEIGHTS / CONFIG)]
        yield from [run, *(f"{run}/{stage}" for stage in models)] if models else []


def _unknown(name: str, runs: Path, others: Iterable[str]) -> str:
    """Return the sentence on a name that stands for nothing."""
    command = pull_command(name)
    if command:
        return f"{name} is not here yet; `{command}` fetches it"
    if published(name):
        return f"{name}: there are no weights of it here, `limbeck show` and `limbeck plan` know its shapes"
    for path in (Path(name), runs / name):
        run = _run_around(path)
        if run:
            stages = list(read_json(run / INDEX))
            stage = path.relative_to(run).as_posix()
            return f"{run} has no finished stage {stage}; it has {_joined(_nearest(stage, stages)) or 'none'}"
    reason = "no model or artifact of that name"
    if os.path.exists(name):
        reason = f"holds no model: neither {CONFIG}, nor a run's {INDEX}, nor an artifact's {MANIFEST}"
    shown = name if name.isprintable() and len(name) <= MAX_SHOWN else repr(name[:MAX_SHOWN])
    return f"{shown or 'the empty name'}: {reason}; {_listing(name, runs, others)}"


def _listing(name: str, runs: Path, others: Iterable[str] = ()) -> str:
    """Return a clause that lists the models that there are and `others`, names like `name` first."""
    known = list(dict.fromkeys([*names(runs), *others]))
    if not known:
        return (
            f"there is none in {MODELS_FOLDER} or {runs}: `limbeck pull smollm2-135m` fetches one, "
            "`limbeck run quickstart` makes some"
        )
    listed = _nearest(name, known)
    rest = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"there are {', '.join(listed[:LISTED])}{rest}; {PAGE}"


def _nearest(name: str, known: list[str]) -> list[str]:
    """Return `known` with the names that are like `name` first."""
    close = get_close_matches(name, known, n=3)
    return [*close, *(other for other in known if other not in close)]


def _joined(words: Iterable[str]) -> str:
    """Return words with commas."""
    return ", ".join(words)


def _a(noun: str) -> str:
    """Return a noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
