"""The table of runs: date, time, best accuracy and differing settings of each, read from their folders."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..report.loaded_run import EVALUATION
from .run_folder import RECIPE, read_recipe
from .run_state import RunState, last_change

UNCOMPARED = ("name", "description", "workers", "threads")  # settings of a recipe that change no result


class Accuracy(NamedTuple):
    """The accuracy of a model on a source of problems: `Accuracy(0.72, 0.69, 0.75, "r1", "clock", "t1")`.

    `mean`, `low` and `high` are shares from 0 to 1; `mode` is the way of sampling.
    """

    mean: float
    low: float
    high: float
    model: str
    source: str
    mode: str


@dataclass(frozen=True)
class RunRow:
    """A run in the table: `RunRow("quickstart", 1763822100.0, 431.0, best, {"stages.zero.steps": "60"})`.

    `changed` is the Unix time of the last change, `seconds` the time that its finished
    stages took. `settings`
    are those in which it differs from the listed runs with the same stages.
    """

    name: str
    changed: float
    seconds: float
    best: Accuracy | None
    settings: dict[str, str] = field(default_factory=dict)


def rows(runs: Iterable[RunState]) -> dict[str, RunRow]:
    """Return the row of each run, by the run's name."""
    runs = list(runs)
    differing = differing_settings(runs)
    table = {}
    for run in runs:
        name = run.folder.name
        seconds = sum(stage.manifest.get("seconds") or 0.0 for stage in run.stages)
        table[name] = RunRow(name, last_change(run.folder), seconds, best_accuracy(run), differing[name])
    return table


def best_accuracy(run: RunState) -> Accuracy | None:
    """Return the best accuracy that the run's evaluations have measured; None before the first one."""
    measured = accuracies(run)
    return max(measured, key=lambda accuracy: accuracy.mean) if measured else None


def accuracies(run: RunState) -> list[Accuracy]:
    """Return the accuracy of each evaluated model, each on the evaluation's first source of problems and at
    temperature 1, or in the first mode without it."""
    folders = [stage.folder for stage in run.stages if stage.kind == "evaluate" and stage.state == "done"]
    return [accuracy for folder in folders for accuracy in _accuracies(folder)]


@lru_cache(maxsize=2048)
def _accuracies(folder: Path) -> tuple[Accuracy, ...]:
    """Return the accuracy in an evaluation's artifact, which never changes; empty without one."""
    try:
        evaluation = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return ()
    for source, measured in evaluation["sources"].items():
        modes = measured["modes"]
        mode = "t1" if "t1" in modes else next(iter(modes))
        interval = modes[mode]["accuracy"]
        ends = (interval["mean"], interval["low"], interval["high"])
        return (Accuracy(*ends, evaluation["model"], source, mode),)
    return ()


# ---------------------------------------------------------------- settings


def differing_settings(runs: Sequence[RunState]) -> dict[str, dict[str, str]]:
    """Return, by the run's name, the settings in which a run differs from the others with the same stages.

    They are the settings' dotted keys and their values as text.
    """
    variants: dict[Any, list[RunState]] = defaultdict(list)
    for run in runs:
        variants[frozenset((stage.name, stage.kind) for stage in run.stages)].append(run)
    found = {}
    for group in variants.values():
        found |= compare({run.folder.name: run for run in group})
    return found


def compare(runs: Mapping[str, RunState]) -> dict[str, dict[str, str]]:
    """Return, by the run's name, all settings in which the runs differ. A setting that one of the runs does
    not have is left out for that run."""
    settings = {name: settings_of(run.folder) for name, run in runs.items()}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    differing = [key for key in keys if len({values.get(key) for values in settings.values()}) > 1]
    return {
        name: {key: values[key] for key in differing if key in values} for name, values in settings.items()
    }


def settings_of(run: Path) -> dict[str, str]:
    """Return all settings of a run's recipe as text, by their dotted keys. Raises LimbeckError if the recipe
    cannot be read."""
    return _settings_of(run, (run / RECIPE).stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _settings_of(run: Path, modified: int) -> dict[str, str]:
    recipe = read_recipe(run).model_dump(mode="json", exclude=set(UNCOMPARED))
    return dict(_flatten(recipe, ""))


def _flatten(value: Any, key: str) -> Iterable[tuple[str, str]]:
    """Yield the dotted keys below `key` with their values as text."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
