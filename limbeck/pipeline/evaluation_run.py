"""The run that evaluates models on held-out problems outside their own recipes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.recipe import Evaluate, Load, Problems, Recipe
from .model_name import NamedModel
from .run import Display, Run
from .store import digest_of


@dataclass(frozen=True)
class HeldOut:
    """What is asked: the settings of the evaluation and the sources of problems by name. The problems are
    drawn with the seed of a recipe and the name of its evaluate stage."""

    settings: Evaluate
    problems: Mapping[str, Problems]
    recipe_seed: int = 0
    stage: str = "evaluation"

    @property
    def seed(self) -> str:
        """The seed of the stage, from which all its draws derive: `0/evaluation`."""
        return f"{self.recipe_seed}/{self.stage}"


@dataclass(frozen=True)
class EvaluationRun:
    """A run with one evaluate stage over models that are there already. `nodes` are the names of their
    evaluations, in the order of the models."""

    run: Run
    nodes: tuple[str, ...]

    def folders(self) -> list[Path]:
        """Return the folder of each model's evaluation, once the run has been carried out. What the store had
        already, from whatever run, was not evaluated again."""
        return [self.run.graph.nodes[name].artifact.folder for name in self.nodes]


def prepare(
    models: Sequence[NamedModel], asked: HeldOut, home: Path, display: Display, device: str
) -> EvaluationRun:
    """Return the run that asks the models. `home` is the folder of all runs.

    A model that a stage in `home` made is read where it is; any other is loaded into the store, as by a
    recipe.
    """
    named = dict(zip(_stage_names(models, asked.stage), models, strict=True))
    store = (home / "store").resolve()
    given = {
        name: model.artifact
        for name, model in named.items()
        if model.artifact and model.artifact.folder.parent.resolve() == store
    }
    stages = {name: Load(kind="load", path=str(named[name].path.resolve())) for name in sorted(named)}
    settings = asked.settings.model_copy(update={"models": list(stages)})
    problems = {name: asked.problems[name] for name in settings.problems}
    stages[asked.stage] = settings
    recipe = Recipe(
        name=_name_run(list(named.values()), asked), seed=asked.recipe_seed, problems=problems, stages=stages
    )
    run = Run(recipe, home, home, display, device=device, given=given)
    return EvaluationRun(run, tuple(f"{asked.stage}/{name}" for name in named))


def _stage_names(models: Sequence[NamedModel], stage: str) -> list[str]:
    """Return the name of each model's stage: that by which its own run knows it, so that the evaluations of
    that run are found; with a part of a hash where two names would be the same."""
    names = [_plain(model.title) for model in models]
    if len({*names, stage}) > len(models):
        return names
    return [f"{name}-{_identify(model)[:6]}" for name, model in zip(names, models, strict=True)]


def _identify(model: NamedModel) -> str:
    """Return the key of the stage that made a model; of another model, the hash of its path."""
    return model.artifact.manifest["key"] if model.artifact else digest_of(str(model.path.resolve()))


def _name_run(models: Sequence[NamedModel], asked: HeldOut) -> str:
    """Return the run's name: those of the models, and the hash of them and of what is asked."""
    problems = {name: asked.problems[name].model_dump(mode="json") for name in asked.settings.problems}
    identities = sorted(map(_identify, models))
    mark = digest_of([identities, asked.settings.model_dump(mode="json"), problems, asked.seed])
    return "-".join([*sorted(_plain(model.title) for model in models), mark[:8]])


def _plain(title: str) -> str:
    """Return a model's title as a name of a folder may be written."""
    return re.sub(r"[^\w.-]", "-", title).lstrip(".-") or "model"
