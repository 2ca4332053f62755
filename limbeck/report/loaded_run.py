"""A finished run as the report reads it from its folders: stages, evaluations, and the models' roles.

A role is the part that a model plays in the report, one of `ROLES`: base is the model before RL, zero is
trained by RL alone, control is base with forced retries, dev1 to dev3 are the models between zero and r1, r1
is the end of the recipe, and small is distilled from it. small_base, small_rl and small_answers are other
small models that small is compared with.

A source is a set of problems; the headline source is the first one. A mode is a way of sampling and scoring,
one of `MODES`: t1 is temperature 1, t06 is temperature 0.6, pass@8 and cons@8 score eight responses to a
problem together. A stage's manifest describes its results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..eval.statistics import Interval
from ..run_log import read, read_metrics

EVALUATION = "evaluation.json"
SAMPLES = "samples.jsonl"
VERDICTS = "verdicts.jsonl"
MODES = ("t1", "t06", "greedy", "pass@8", "cons@8")
ROLES = (
    "base",
    "control",
    "zero",
    "dev1",
    "dev2",
    "dev3",
    "r1",
    "small",
    "small_base",
    "small_rl",
    "small_answers",
)


@dataclass(frozen=True)
class StageView:
    """One stage of a run, with its folder and manifest.

    For instance `StageView("zero", "rl", "", Path("store/rl-3fa9..."), {...}, ("base",))`. `title` is the
    stage's title in the recipe, "" for none; `inputs` are the names of the stages that it read.
    """

    name: str
    kind: str
    title: str
    folder: Path
    manifest: dict[str, Any]
    inputs: tuple[str, ...]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of the stage's metrics log, one dict for each logged step."""
        return read_metrics(self.folder)

    @property
    def notes(self) -> dict[str, Any]:
        """The notes in the stage's manifest: results such as the number of rows kept."""
        return self.manifest.get("notes") or {}

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps at which the metric `key` was measured, and its values at these steps."""
        steps = []
        values = []
        for row in self.metrics:
            if row.get(key) is not None:
                steps.append(float(row["step"]))
                values.append(float(row[key]))
        return steps, values


@dataclass(frozen=True)
class Run:
    """Everything that a report is made from: `Run(stages, recipe, {"seconds": 431.0, "machine": {...}})`.

    `recipe` is the resolved recipe as a dict; `summary` holds the costs of the whole run and the machine.
    """

    stages: tuple[StageView, ...]
    recipe: dict[str, Any]
    summary: dict[str, Any]

    @cached_property
    def report_stage(self) -> dict[str, Any]:
        """The settings of the recipe's report stage; an empty dict if it has none."""
        stages = self.recipe.get("stages") or {}
        for stage in stages.values():
            if stage.get("kind") == "report":
                return stage
        return {}

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The evaluation of each model, by the model's name. The name of a model that was forced to retry
        is `NAME+forced`, that of a model whose thoughts were cut off `NAME+cut`.

        Only the evaluations that the report stage names are included, or all if it names none.
        """
        evaluated = self.of_kind("evaluate")
        prefix = f"{self.report_stage.get('evaluation')}/"
        cited = [stage for stage in evaluated if stage.name.startswith(prefix)]
        evaluations = {}
        for stage in cited or evaluated:
            evaluation = json.loads((stage.folder / EVALUATION).read_text(encoding="utf-8"))
            name = evaluation["model"].partition("+")[0]
            if evaluation.get("control"):
                name = f"{name}+{evaluation['control']}"
            evaluations[name] = {**evaluation, "folder": stage.folder}
        return evaluations

    @cached_property
    def sources(self) -> list[str]:
        """The names of the sources of problems that models were evaluated on, the headline source first."""
        sources: dict[str, None] = {}
        for evaluation in self.evaluations.values():
            sources.update(dict.fromkeys(evaluation["sources"]))
        return list(sources)

    @cached_property
    def cast(self) -> dict[str, str]:
        """The model with each role, by role. Roles whose model this run does not have are left out."""
        story = dict(self.report_stage.get("story") or {})
        story.setdefault("control", f"{story.get('base')}+forced")
        known = {stage.name for stage in self.stages} | set(self.evaluations)
        return {role: story[role] for role in ROLES if story.get(role) in known}

    def role(self, role: str) -> str | None:
        """Return the name of the model with a role, or None.

        Only the recipe assigns roles: a model called `zero` does not have the role `zero` for its name alone.
        """
        return self.cast.get(role)

    def stage(self, name: str | None) -> StageView | None:
        """Return the stage called `name`, or None if there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        return None

    def of_kind(self, *kinds: str) -> list[StageView]:
        """Return the stages whose kind is one of `kinds`, in the order of the run."""
        return [stage for stage in self.stages if stage.kind in kinds]

    def modes(self, model: str | None, source: str | None = None) -> dict[str, Any]:
        """Return the measurements of a model in each mode, by mode.

        `source` names the problems; None for the headline source.
        """
        evaluation = self.evaluations.get(model or "", {})
        if not source:
            source = self.sources[0] if self.sources else ""
        return evaluation.get("sources", {}).get(source, {}).get("modes", {})

    def accuracy(self, model: str | None, mode: str = "t1", source: str | None = None) -> Interval | None:
        """Return a model's accuracy in a mode, with its interval, or None if it was not evaluated so.

        `source` names the problems; None for the headline source.
        """
        accuracy = self.modes(model, source).get(mode, {}).get("accuracy")
        if not accuracy:
            return None
        return Interval(**{key: accuracy[key] for key in ("mean", "low", "high", "n", "problems")})

    def measure(self, model: str | None, name: str) -> float | None:
        """Return a model's mean of the measure `name` (length, attempts and others, not the accuracy), at
        temperature 1 if measured there, else in the first mode that has it.

        Return None if no mode has it.
        """
        modes = self.modes(model)
        at_temperature_1 = modes.get("t1")
        ordered = sorted(modes.values(), key=lambda mode: mode is not at_temperature_1)
        for mode in ordered:
            stats = mode.get("stats") or {}
            value = mode.get(name, stats.get(name))
            if value is not None:
                return float(value)
        return None

    def parameters(self, model: str | None) -> float | None:
        """Return the number of parameters of a model, or None if unknown.

        A stage that does not note it has as many as the model that it began with.
        """
        stage = self.stage((model or "").partition("+")[0])
        while stage is not None and "parameters" not in stage.notes:
            settings = self.recipe.get("stages", {}).get(stage.name) or {}
            initial = settings.get("model")
            stage = self.stage(initial) if initial != stage.name else None
        return stage.notes["parameters"] if stage else None

    def spent(self, model: str | None, key: str) -> float | None:
        """Return a cost of the stage that made the model, or None if unknown.

        `key` is seconds, tokens, flops or another key of the manifest.
        """
        stage = self.stage(model)
        return stage.manifest.get(key) if stage else None

    def total(self, key: str) -> float | None:
        """Return the sum of a cost over the stages that measured it, or None if none did.

        `key` is a key of the manifests, such as tokens.
        """
        costs = [stage.manifest.get(key) for stage in self.stages]
        measured = [cost for cost in costs if cost is not None]
        return sum(measured) if measured else None

    def samples(self, role: str) -> dict[str, dict[str, Any]]:
        """Return one response of the model with the given role to each problem, by problem.

        The responses are sampled at temperature 1 if there are such, else in the first recorded mode.
        """
        evaluation = self.evaluations.get(self.role(role) or "")
        return samples_of(evaluation["folder"]) if evaluation else {}

    def alarms(self) -> Iterator[tuple[str, str, int, int]]:
        """Yield every alarm of the run's stages as (stage, message, first step, number of times).
        Evaluations have no alarms.

        Messages of one stage that differ only in their numbers are one alarm, reported with the first of
        them.
        """
        for stage in self.stages:
            if stage.kind == "evaluate":
                continue
            for times in _alarms(stage.metrics).values():
                message, step = times[0]
                yield stage.name, message, step, len(times)


def _alarms(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, int]]]:
    """Return the alarms in the metrics `rows`, grouped by their text without digits.

    Each value is the list of (message, step) of one group.
    """
    alarms: dict[str, list[tuple[str, int]]] = {}
    for row in rows:
        for alarm in row.get("alarms") or []:
            message = str(alarm)
            kind = re.sub(r"\d+", "", message)
            alarms.setdefault(kind, []).append((message, int(row["step"])))
    return alarms


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the first recorded response to each problem of an evaluation, by problem. `folder` is the
    evaluation's folder.

    The responses are of one mode: temperature 1 if there is one, else the mode of the first row.
    """
    rows = list(read(folder / SAMPLES))
    modes = [row["mode"] for row in rows]
    mode = "t1" if "t1" in modes else next(iter(modes), "")
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["mode"] == mode:
            first.setdefault(row["problem"], row)
    return first
