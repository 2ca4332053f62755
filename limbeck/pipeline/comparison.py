"""Two models or two runs side by side: accuracies on the same problems, learning curves, and costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from ..report.loaded_run import VERDICTS, StageView
from ..report.paired import PairedResult, compare, read_verdicts
from ..types import LimbeckError
from . import run_state, run_table
from .model_name import NamedModel, find
from .provenance.lineage import lineage_of
from .run_state import RunState

COSTS = ("seconds", "flops", "tokens")
LEARNING = ("pretrain", "rl", "sft", "dpo", "distill", "reward")  # kinds of stages whose metrics are curves


@dataclass(frozen=True)
class Side:
    """One side of a comparison: `Side("quickstart/r1", {"r1": (Path("store/evaluate-3fa9..."),)}, ...)`.

    `evaluations` maps the names of models to the folders of their evaluations, `stages` the names of stages
    that learned to their logs. `costs` has the seconds, FLOPs and tokens of everything that led to the model,
    or of the run's finished stages. `run` is the state of a run, None for a model.
    """

    title: str
    evaluations: Mapping[str, tuple[Path, ...]]
    stages: Mapping[str, StageView]
    costs: Mapping[str, float]
    run: RunState | None = None


@dataclass(frozen=True)
class Comparison:
    """Sides `a` and `b` with what they have in common.

    `results` maps a model's name to its results: the name that it has in both runs, or that of B if two
    models are compared. `settings` are those in which two runs differ, by side.
    """

    a: Side
    b: Side
    results: Mapping[str, list[PairedResult]]
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def stages(self) -> dict[str, tuple[StageView, StageView]]:
        """Return the pairs of stages whose curves can be drawn over each other, by a title: those of one
        name, or the two that made the models."""
        if self.a.run and self.b.run:
            return {
                name: (stage, self.b.stages[name])
                for name, stage in self.a.stages.items()
                if name in self.b.stages
            }
        pairs = zip(self.a.stages.values(), self.b.stages.values(), strict=False)
        return {f"{one.name} · {other.name}": (one, other) for one, other in pairs}


def compare_names(a: str, b: str, runs: Path) -> Comparison:
    """Return the comparison of what two names stand for: of two runs, if both name one, else of two models.

    Raises:
        LimbeckError: a name stands for nothing, or no evaluation asked both the same problems.
    """
    models = {name: find(name, runs) for name in (a, b)}
    if len(models) < 2:
        raise LimbeckError(f"{a} twice: name two different models or runs to compare")
    if all(model.run for model in models.values()):
        one, other = (_run_side(name, model.run) for name, model in models.items())
        pairs = [(name, name) for name in one.evaluations if name in other.evaluations]
        settings = run_table.compare({side.title: side.run for side in (one, other)})
    else:
        one, other = (_model_side(name, model) for name, model in models.items())
        pairs = [(one.title, other.title)]
        settings = {}
    results = {}
    for before, after in pairs:
        found = _best(one.evaluations.get(before, ()), other.evaluations.get(after, ()))
        if found:
            results[after] = found
    if not results:
        raise LimbeckError(_nothing_common(one, other))
    return Comparison(one, other, results, settings)


def compare_evaluations(models: Sequence[NamedModel], folders: Sequence[Path]) -> Comparison:
    """Return the comparison of two models by one evaluation of each, given by the evaluations' folders."""
    sides = []
    for name, model, folder in zip("AB", models, folders, strict=True):
        title = model.title if models[0].title != models[1].title else f"{model.title} ({name})"
        sides.append(replace(_model_side(title, model), evaluations={title: (folder,)}))
    one, other = sides
    return Comparison(one, other, {other.title: _best([folders[0]], [folders[1]])})


def _run_side(title: str, folder: Path) -> Side:
    """Return the side of a run: its evaluated models, its stages, and what they cost."""
    run = run_state.look(folder)
    finished = [stage for stage in run.stages if stage.state == "done" and stage.manifest]
    evaluations: dict[str, tuple[Path, ...]] = {}
    for stage in finished:
        if stage.kind == "evaluate":
            model = stage.name.partition("/")[2]
            evaluations[model] = (*evaluations.get(model, ()), stage.folder)
    stages = {stage.name: stage.view for stage in finished if stage.kind in LEARNING}
    return Side(title, evaluations, stages, _costs(stage.manifest for stage in finished), run)


def _model_side(title: str, model: NamedModel) -> Side:
    """Return the side of a model: the evaluations that its store has of it, its stage, and its lineage's
    costs."""
    artifact = model.artifact
    if artifact is None:
        return Side(title, {}, {}, _costs([]))
    evaluations = []
    for other in model.store.all():
        inputs = [cited["digest"] for cited in other.manifest["inputs"].values()]
        control = other.manifest["identity"].get("control")
        if other.kind == "evaluate" and inputs == [artifact.digest] and not control:
            evaluations.append(other.folder)
    view = StageView(model.title, artifact.kind, "", artifact.folder, artifact.manifest, ())
    stages = {model.title: view} if artifact.kind in LEARNING else {}
    costs = _costs(lineage_of(artifact, model.store).entries.values())
    return Side(title, {title: tuple(evaluations)}, stages, costs)


def _costs(manifests: Iterable[Mapping]) -> dict[str, float]:
    """Return the sums of seconds, FLOPs and tokens over the manifests of stages."""
    manifests = list(manifests)
    return {cost: sum(manifest.get(cost) or 0 for manifest in manifests) for cost in COSTS}


def _best(before: Iterable[Path], after: Iterable[Path]) -> list[PairedResult]:
    """Return the results of the pair of evaluations with the most common problems; [] without any."""
    compared = [compare(read_verdicts(a), read_verdicts(b)) for a, b in product(before, after)]
    return max(compared, key=lambda results: sum(result.flips.asked for result in results), default=[])


def _nothing_common(one: Side, other: Side) -> str:
    """Return the error message for sides that no evaluation compares."""
    for side in (one, other):
        folders = [folder for folders in side.evaluations.values() for folder in folders]
        if not folders:
            return (
                f"{side.title} was not evaluated by any run here; ask both now with --problems RECIPE (or a "
                "JSONL file), or run a recipe whose evaluate stage names it"
            )
        if not any((folder / VERDICTS).exists() for folder in folders):
            return (
                f"{side.title}: its evaluation has no verdicts on single problems, as it comes from an older "
                f"version; delete {folders[0]} and run again"
            )
    return (
        f"{one.title} and {other.title} were not asked the same problems; ask both now with --problems "
        "RECIPE (or a JSONL file), or name both under `models` of one evaluate stage"
    )
