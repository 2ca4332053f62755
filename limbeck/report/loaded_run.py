"""What a finished run left behind, as the report reads it: stages, evaluations, and who plays which part."""

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

EVALUATION, SAMPLES = "evaluation.json", "samples.jsonl"
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
        return read_metrics(self.folder)

    @property
    def notes(self) -> dict[str, Any]:
        return self.manifest.get("notes") or {}

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, without the steps that lack it."""
        rows = [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]
        return [float(step) for step, _ in rows], [float(value) for _, value in rows]


@dataclass(frozen=True)
class Run:
    """Everything one report tells of: `Run(stages, recipe, {"seconds": 431.0, "machine": {...}})`."""

    stages: tuple[StageView, ...]
    recipe: dict[str, Any]
    summary: dict[str, Any]

    @cached_property
    def report_stage(self) -> dict[str, Any]:
        stages = self.recipe.get("stages") or {}
        return next((stage for stage in stages.values() if stage.get("kind") == "report"), {})

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Name of a model -> its evaluation; a model with retries forced on it is `NAME+forced`."""
        found = [stage for stage in self.stages if stage.kind == "evaluate"]
        prefix = f"{self.report_stage.get('evaluation')}/"
        chosen = [stage for stage in found if stage.name.startswith(prefix)] or found
        named = {}
        for stage in chosen:
            evaluation = json.loads((stage.folder / EVALUATION).read_text(encoding="utf-8"))
            control = evaluation.get("control")
            name = evaluation["model"].partition("+")[0]
            named[f"{name}+{control}" if control else name] = {**evaluation, "folder": stage.folder}
        return named

    @cached_property
    def sources(self) -> list[str]:
        """The problems that were evaluated on, the headline first."""
        return list(
            dict.fromkeys(s for evaluation in self.evaluations.values() for s in evaluation["sources"])
        )

    @cached_property
    def cast(self) -> dict[str, str]:
        """Role -> model, for the roles that some model of this run plays."""
        story = dict(self.report_stage.get("story") or {})
        story.setdefault("control", f"{story.get('base')}+forced")
        known = {stage.name for stage in self.stages} | set(self.evaluations)
        return {role: story[role] for role in ROLES if story.get(role) in known}

    def role(self, role: str) -> str | None:
        """The model that plays a role; a recipe may well call a model `zero` and give it no part."""
        return self.cast.get(role)

    def stage(self, name: str | None) -> StageView | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def of_kind(self, *kinds: str) -> list[StageView]:
        return [stage for stage in self.stages if stage.kind in kinds]

    def modes(self, model: str | None, source: str | None = None) -> dict[str, Any]:
        sources = self.evaluations.get(model or "", {}).get("sources", {})
        wanted = source or (self.sources[0] if self.sources else "")
        return sources.get(wanted, {}).get("modes", {})

    def accuracy(self, model: str | None, mode: str = "t1", source: str | None = None) -> Interval | None:
        found = self.modes(model, source).get(mode, {}).get("accuracy")
        return (
            Interval(**{key: found[key] for key in ("mean", "low", "high", "n", "problems")})
            if found
            else None
        )

    def measure(self, model: str | None, name: str) -> float | None:
        """A mean beside the accuracy (length, attempts, ...), at temperature 1 or else wherever measured."""
        modes = self.modes(model)
        for mode in sorted(modes.values(), key=lambda m: m is not modes.get("t1")):
            value = mode.get(name, (mode.get("stats") or {}).get(name))
            if value is not None:
                return float(value)
        return None

    def parameters(self, model: str | None) -> float | None:
        """Parameters of a model; SFT and RL keep those of the model they begin with."""
        stage = self.stage((model or "").partition("+")[0])
        while stage is not None and "parameters" not in stage.notes:
            started = (self.recipe.get("stages", {}).get(stage.name) or {}).get("model")
            stage = self.stage(started) if started != stage.name else None
        return stage.notes["parameters"] if stage else None

    def spent(self, model: str | None, key: str) -> float | None:
        """What the last stage of a model cost: `key` is seconds, tokens, flops, ..."""
        stage = self.stage(model)
        return stage.manifest.get(key) if stage else None

    def total(self, key: str) -> float | None:
        """Sum over the stages that tell; None where none does."""
        told = [stage.manifest[key] for stage in self.stages if stage.manifest.get(key) is not None]
        return sum(told) if told else None

    def samples(self, role: str) -> dict[str, dict[str, Any]]:
        """Problem -> the model's response to it, at temperature 1 where there is one."""
        evaluation = self.evaluations.get(self.role(role) or "")
        return samples_of(evaluation["folder"]) if evaluation else {}

    def alarms(self) -> Iterator[tuple[str, str, int, int]]:
        """Every alarm that rang: stage, what it said first, at which step, how often.

        An alarm's numbers change from step to step; without them it is the same alarm.
        """
        for stage in self.stages:
            rung: dict[str, list[tuple[str, int]]] = {}
            for row in stage.metrics if stage.kind != "evaluate" else []:
                for alarm in row.get("alarms") or []:
                    rung.setdefault(re.sub(r"\d+", "", str(alarm)), []).append((str(alarm), int(row["step"])))
            for times in rung.values():
                yield stage.name, *times[0], len(times)


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    """An evaluation's first response to each problem, at temperature 1 where there is one."""
    rows = list(read(folder / SAMPLES))
    mode = "t1" if any(row["mode"] == "t1" for row in rows) else rows[0]["mode"] if rows else ""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["mode"] == mode:
            first.setdefault(row["problem"], row)
    return first
