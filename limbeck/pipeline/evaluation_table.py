"""The table of what the evaluations of runs measured: a row for each model and source of problems, and the
mean of several seeds.

A measure is an accuracy in one way of sampling (`t1`, `t06`, `greedy`, `pass@8`), or a mean over the
completions at temperature 1, or of the first way asked: the length of a completion and of its thought
in tokens, the language consistency, the truncated share, and the statistics of the task.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..report.loaded_run import EVALUATION
from ..types import LimbeckError
from . import run_state, run_table
from .run_folder import read_json
from .run_state import RunState

WAYS = ("t1", "t06", "greedy", "pass@8")
MEANS = ("length", "thought_length", "language_consistency", "truncated")


@dataclass(frozen=True)
class Measure:
    """A measured mean: `Measure(.848, .825, .869, 1020, 340, "t1")`.

    `low` and `high` are the ends of its 95 % interval over problems, None if it has none; `n` is the number
    of completions, `problems` that of the problems that they answer, None if unknown. `way` is the way of
    sampling of the completions.

    Of several `seeds`, `mean` is the mean of theirs, `low` and `high` are the lowest and the highest,
    `deviation` is their standard deviation (of a sample: divided by the number less one), and `n` and
    `problems` are those of one seed.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    problems: int | None = None
    way: str = ""
    seeds: int = 1
    deviation: float | None = None


@dataclass(frozen=True)
class EvaluationRow:
    """What was measured of a model on a source of problems: `EvaluationRow("quickstart", 0, "evaluation",
    "r1", "clock", {"t1": measure, ...})`.

    `run` is the run's name, "" for the mean of several; `evaluation` is the name of the evaluate stage. A
    model that was forced to retry is `NAME+forced`, one whose thoughts were cut off `NAME+cut`.
    """

    run: str
    seed: int | None
    evaluation: str
    model: str
    source: str
    measures: Mapping[str, Measure]


def look(folder: Path) -> RunState:
    """Return the state of the run in `folder`. Raises LimbeckError if it has evaluated nothing yet."""
    run = run_state.look(folder)
    if next(_evaluations(run), None) is None:
        raise LimbeckError(
            f"{folder.name} has no finished evaluation; its recipe needs an evaluate stage, and `limbeck "
            f"status {folder.name}` says where the run stands"
        )
    return run


def rows_of(run: RunState) -> list[EvaluationRow]:
    """Return the rows of a run: the evaluate stages in order, then the sources, then the models."""
    rows = []
    for stage, evaluation in _evaluations(run):
        named = {"run": run.folder.name, "seed": run.recipe.seed, "evaluation": stage}
        rows += [replace(row, **named) for row in rows_of_evaluation(evaluation)]
    stages = list(dict.fromkeys(row.evaluation for row in rows))
    sources = list(dict.fromkeys(row.source for row in rows))
    return sorted(rows, key=lambda row: (stages.index(row.evaluation), sources.index(row.source)))


def rows_of_evaluation(evaluation: Mapping[str, Any]) -> list[EvaluationRow]:
    """Return the rows of one evaluation, a row for each source; without the names of run and stage."""
    model = evaluation["model"].partition("+")[0]
    if evaluation.get("control"):
        model = f"{model}+{evaluation['control']}"
    return [
        EvaluationRow("", None, "", model, source, dict(_measures(measured["modes"])))
        for source, measured in evaluation["sources"].items()
    ]


def pool(runs: Sequence[RunState]) -> list[EvaluationRow]:
    """Return the rows of several runs of one recipe, which differ in their seeds: the mean of each measure
    over the seeds. A row or a measure that one of the runs lacks is left out.

    Raises:
        LimbeckError: the runs differ in another setting, or two have the same seed.
    """
    _check_seeds(runs)
    first, *others = [{(row.evaluation, row.source, row.model): row for row in rows_of(run)} for run in runs]
    pooled = []
    for key, row in first.items():
        if not all(key in rows for rows in others):
            continue
        found = [row.measures, *(rows[key].measures for rows in others)]
        names = [name for name in row.measures if all(name in measures for measures in found)]
        means = {name: _mean([measures[name] for measures in found]) for name in names}
        pooled.append(replace(row, run="", seed=None, measures=means))
    return pooled


def suites_of(runs: Sequence[RunState]) -> dict[str, dict[str, Any]]:
    """Return the results on named benchmarks: model -> benchmark -> result. A model of several runs is named
    with its run."""
    results: dict[str, dict[str, Any]] = {}
    for run in runs:
        for _, evaluation in _evaluations(run):
            if evaluation.get("suites"):
                model = evaluation["model"]
                name = f"{run.folder.name}/{model}" if len(runs) > 1 else model
                results.setdefault(name, {}).update(evaluation["suites"])
    return results


def _evaluations(run: RunState) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the stage's name and the content of each finished evaluation of a run."""
    for stage in run.stages:
        if stage.kind == "evaluate" and stage.state == "done":
            yield stage.name.partition("/")[0], read_json(stage.folder / EVALUATION)


def _measures(modes: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Measure]]:
    """Yield the measures of a model on a source by name, from what was measured in each way of sampling.
    pass@8 is that on all problems, if a way has as many completions of each, else that of its own way."""
    passed = {way: figures["pass@8"] for way, figures in modes.items() if "pass@8" in figures}
    for way in WAYS:
        if way in modes and not (way == "pass@8" and passed):
            yield way, _measure(modes[way]["accuracy"], way)
    for way, interval in list(passed.items())[:1]:
        yield "pass@8", _measure(interval, way)
    way = "t1" if "t1" in modes else next(iter(modes))
    yield from _means(modes[way], way)


def _means(figures: Mapping[str, Any], way: str) -> Iterator[tuple[str, Measure]]:
    """Yield the means over the completions of one way of sampling, then the statistics of the task."""
    for name in MEANS:
        if figures.get(name) is not None:  # earlier versions measured no intervals
            yield name, _measure(figures.get("intervals", {}).get(name) or {"mean": figures[name]}, way)
    for name, mean in (figures.get("stats") or {}).items():
        if mean is not None and name not in MEANS:
            yield name, Measure(mean, way=way)


def _measure(interval: Mapping[str, Any], way: str) -> Measure:
    """Return the measure that an evaluation holds as an interval."""
    return Measure(*(interval.get(key) for key in ("mean", "low", "high", "n", "problems")), way)


def _mean(measures: Sequence[Measure]) -> Measure:
    """Return the mean of the same measure of several seeds, with their spread."""
    means = [measure.mean for measure in measures]
    return replace(
        measures[0],
        mean=statistics.fmean(means),
        low=min(means),
        high=max(means),
        seeds=len(means),
        deviation=statistics.stdev(means),
    )


def _check_seeds(runs: Sequence[RunState]) -> None:
    """Raise LimbeckError unless the runs are of one recipe with a different seed each."""
    if len(runs) < 2:
        raise LimbeckError("--pool needs several runs of one recipe with different seeds; name them all")
    seeds: dict[int, str] = {}
    for run in runs:
        name = run.folder.name
        if run.recipe.seed in seeds:
            raise LimbeckError(
                f"{seeds[run.recipe.seed]} and {name} both have the seed {run.recipe.seed}; run the recipe "
                "with another one (--set seed=1 --set name=...)"
            )
        seeds[run.recipe.seed] = name
    differing = run_table.compare({run.folder.name: run for run in runs})
    keys = {key for settings in differing.values() for key in settings} - {"seed"}
    if keys:
        raise LimbeckError(
            f"{' and '.join(differing)} differ in {', '.join(sorted(keys))}; --pool takes runs of one recipe "
            "that differ in their seed alone"
        )
