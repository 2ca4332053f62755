"""A finished run as the report reads it from its folders: stages, evaluations, and the models' roles."""

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
    """One stage of a run: `StageView("zero", "rl", "", Path("store/rl-3fa9..."), {...}, ("base",))`."""

    name: str
    kind: str
    title: str
    folder: Path
    manifest: dict[str, Any]
    inputs: tuple[str, ...]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of the stage's metrics."""
        return read_metrics(self.folder)

    @property
    def notes(self) -> dict[str, Any]:
        """The notes in the stage's manifest."""
        return self.manifest.get("notes") or {}

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, without the steps that lack it."""
        steps = []
        values = []
        for row in self.metrics:
            if row.get(key) is not None:
                steps.append(float(row["step"]))
                values.append(float(row[key]))
        return steps, values


@dataclass(frozen=True)
class Run:
    """Everything a report is made from: `Run(stages, recipe, {"seconds": 431.0, "machine": {...}})`."""

    stages: tuple[StageView, ...]
    recipe: dict[str, Any]
    summary: dict[str, Any]

    @cached_property
    def report_stage(self) -> dict[str, Any]:
        """The recipe's report stage, or {}."""
        stages = self.recipe.get("stages") or {}
        for stage in stages.values():
            if stage.get("kind") == "report":
                return stage
        return {}

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Name of a model -> its evaluation; a model with forced retries is `NAME+forced`.

        Only the evaluations that the report stage cites, or all if it cites none.
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
        """The problems that models were evaluated on, the headline ones first."""
        sources: dict[str, None] = {}
        for evaluation in self.evaluations.values():
            sources.update(dict.fromkeys(evaluation["sources"]))
        return list(sources)

    @cached_property
    def cast(self) -> dict[str, str]:
        """Role -> model, for the roles that a model of this run has."""
        story = dict(self.report_stage.get("story") or {})
        story.setdefault("control", f"{story.get('base')}+forced")
        known = {stage.name for stage in self.stages} | set(self.evaluations)
        return {role: story[role] for role in ROLES if story.get(role) in known}

    def role(self, role: str) -> str | None:
        """The model with a role. A model called `zero` has the role `zero` only if the recipe says so."""
        return self.cast.get(role)

    def stage(self, name: str | None) -> StageView | None:
        """The stage with a name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        return None

    def of_kind(self, *kinds: str) -> list[StageView]:
        """The stages of some kinds, in order."""
        return [stage for stage in self.stages if stage.kind in kinds]

    def modes(self, model: str | None, source: str | None = None) -> dict[str, Any]:
        """Mode -> measurements of a model on a source of problems, by default the headline one."""
        evaluation = self.evaluations.get(model or "", {})
        if not source:
            source = self.sources[0] if self.sources else ""
        return evaluation.get("sources", {}).get(source, {}).get("modes", {})

    def accuracy(self, model: str | None, mode: str = "t1", source: str | None = None) -> Interval | None:
        """Accuracy of a model in a mode with its interval; None where it was not evaluated."""
        accuracy = self.modes(model, source).get(mode, {}).get("accuracy")
        if not accuracy:
            return None
        return Interval(**{key: accuracy[key] for key in ("mean", "low", "high", "n", "problems")})

    def measure(self, model: str | None, name: str) -> float | None:
        """A mean other than the accuracy (length, attempts, ...), at temperature 1 or else in any mode."""
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
        """Number of parameters of a model; SFT and RL keep those of the model they begin with."""
        stage = self.stage((model or "").partition("+")[0])
        while stage is not None and "parameters" not in stage.notes:
            settings = self.recipe.get("stages", {}).get(stage.name) or {}
            initial = settings.get("model")
            stage = self.stage(initial) if initial != stage.name else None
        return stage.notes["parameters"] if stage else None

    def spent(self, model: str | None, key: str) -> float | None:
        """Cost of a model's last stage: `key` is seconds, tokens, flops, ..."""
        stage = self.stage(model)
        return stage.manifest.get(key) if stage else None

    def total(self, key: str) -> float | None:
        """Sum of a cost over the stages that measured it; None where none did."""
        costs = [stage.manifest.get(key) for stage in self.stages]
        measured = [cost for cost in costs if cost is not None]
        return sum(measured) if measured else None

    def samples(self, role: str) -> dict[str, dict[str, Any]]:
        """Problem -> the model's response to it, at temperature 1 where there is one."""
        evaluation = self.evaluations.get(self.role(role) or "")
        return samples_of(evaluation["folder"]) if evaluation else {}

    def alarms(self) -> Iterator[tuple[str, str, int, int]]:
        """Every alarm of every stage: stage, message, first step, number of times.

        Messages that differ only in their numbers are one alarm, with the first message.
        """
        for stage in self.stages:
            if stage.kind == "evaluate":
                continue
            for times in _alarms(stage.metrics).values():
                message, step = times[0]
                yield stage.name, message, step, len(times)


def _alarms(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, int]]]:
    """Alarm without its numbers -> its messages and steps."""
    alarms: dict[str, list[tuple[str, int]]] = {}
    for row in rows:
        for alarm in row.get("alarms") or []:
            message = str(alarm)
            kind = re.sub(r"\d+", "", message)
            alarms.setdefault(kind, []).append((message, int(row["step"])))
    return alarms


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Problem -> an evaluation's first response to it, at temperature 1 where there is one."""
    rows = list(read(folder / SAMPLES))
    modes = [row["mode"] for row in rows]
    mode = "t1" if "t1" in modes else next(iter(modes), "")
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["mode"] == mode:
            first.setdefault(row["problem"], row)
    return first
