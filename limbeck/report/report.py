"""The two files of a run's report: `index.html` for people, `report.json` for programs.

`report.json`, schema 1 (docs/reference/report.md describes every field):

    {"schema": 1, "name", "seed", "source": the headline problems, "story": {ROLE: MODEL},
     "models": {NAME: {"accuracy": {"t1" | "t06" | "greedy" | "pass@8" | "cons@8":
                {"mean", "low", "high", "n", "problems"}}, "length", "thought_length", "truncated",
                "format", "language_consistency", "attempts", "persist", "mixed", "parameters", "seconds",
                "tokens", "flops", "control", "other": {SOURCE: {MODE: ...}}}},
     "stages": [{"name", "kind", "title", "inputs", "key", "digest", "code_version", "seconds", "cpu_seconds",
                "peak_memory_bytes", "tokens", "flops", "joules", "licences", "notes"}],
     "seconds", "cpu_seconds", "peak_memory_bytes", "tokens", "flops", "joules", "cost", "machine",
     "forecast": {"seconds", "low", "high", "took": of the stages together, by the clock, "processor",
                "stages": [{"name", "seconds", "low", "high", "took", "processor"}]} or null,
     "comparison": {"target": loss, "ways": {NAME: {"runs", "final_losses", "flops", "parameters",
                "reaches_target_after": FLOPs or null}}} or null,
     "alarms": [{"stage", "alarm", "first": step, "times"}], "not_shown": [sentence]}

Durations are in seconds; accuracies and other shares are from 0 to 1. A value that was not measured is
null. Later versions of schema 1 may add keys but change none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import comparison, page
from .loaded_run import MODES, Run, StageView
from .summary import not_shown

__all__ = ["SCHEMA", "StageView", "numbers", "write"]

SCHEMA = 1  # version number
_MEASURES = (
    "length",
    "thought_length",
    "truncated",
    "format",
    "language_consistency",
    "attempts",
    "persist",
    "mixed",
)
_COSTS = ("seconds", "cpu_seconds", "peak_memory_bytes", "tokens", "flops", "joules")
_ALARM_KEYS = ("stage", "alarm", "first", "times")
_FORECAST_KEYS = ("seconds", "low", "high")  # of a stage's forecast
_DURATION_KEYS = (*_FORECAST_KEYS, "took", "processor")


def write(folder: Path, stages: Sequence[StageView], recipe: dict[str, Any], summary: dict[str, Any]) -> Path:
    """Write `index.html` and `report.json` into `folder` and return the page's path.

    `recipe` is the resolved recipe as a dict; `summary` holds the run's `seconds`, `peak_memory_bytes`,
    `machine`, and `price_per_hour` if one was given.
    """
    run = Run(tuple(stages), recipe, summary)
    content = numbers(run)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    path = folder / "index.html"
    path.write_text(page.render(run, content), encoding="utf-8")
    return path


def numbers(run: Run) -> dict[str, Any]:
    """Return the content of `report.json`, whose fields the top of this module lists."""
    return {
        **_headline(run),
        **_totals(run),
        "cost": _cost(run.summary),
        "machine": run.summary.get("machine") or {},
        "forecast": _forecast(run),
        "comparison": comparison.compare(run),
        "alarms": _alarms(run),
        "not_shown": [text.en for text in not_shown(run)],
    }


def _headline(run: Run) -> dict[str, Any]:
    """Return the first fields of `report.json`: the recipe's name and seed, the headline problems, the
    models with their roles, and the stages.
    """
    return {
        "schema": SCHEMA,
        "name": run.recipe.get("name", ""),
        "seed": run.recipe.get("seed"),
        "source": run.sources[0] if run.sources else None,
        "story": run.cast,
        "models": {name: _model(run, name) for name in run.evaluations},
        "stages": [_stage(stage) for stage in run.stages],
    }


def _totals(run: Run) -> dict[str, Any]:
    """Return the time, memory, tokens, FLOPs and energy of the whole run; None for what was not measured."""
    return {
        "seconds": run.summary.get("seconds"),
        "cpu_seconds": run.total("cpu_seconds"),
        "peak_memory_bytes": run.summary.get("peak_memory_bytes"),
        "tokens": run.total("tokens"),
        "flops": run.total("flops"),
        "joules": run.total("joules"),
    }


def _alarms(run: Run) -> list[dict[str, Any]]:
    """Return the alarms of all stages.

    Alarms of one stage that differ only in numbers are one entry, with the number of times.
    """
    return [dict(zip(_ALARM_KEYS, row, strict=True)) for row in run.alarms()]


def _model(run: Run, name: str) -> dict[str, Any]:
    """Return the accuracies, other measures and costs of one evaluated model."""
    measures = {measure: run.measure(name, measure) for measure in _MEASURES}
    costs = {key: run.spent(name, key) for key in ("seconds", "tokens", "flops")}
    return {
        "accuracy": _accuracies(run, name, None),
        **measures,
        "parameters": run.parameters(name),
        **costs,
        "control": run.evaluations[name].get("control"),
        "other": {source: _accuracies(run, name, source) for source in run.sources[1:]},
    }


def _accuracies(run: Run, model: str, source: str | None) -> dict[str, Any]:
    """Return a model's accuracy with its interval in each mode that was evaluated, by mode.

    `source` names the problems; None for the headline problems.
    """
    accuracies = {}
    for mode in MODES:
        interval = run.accuracy(model, mode, source)
        if interval:
            accuracies[mode] = asdict(interval)
    return accuracies


def _stage(stage: StageView) -> dict[str, Any]:
    """Return one stage's identity (name, kind, inputs, hashes), costs, licences and notes."""
    manifest = stage.manifest
    measured = {key: manifest.get(key) for key in ("key", "digest", "code_version", "continued", *_COSTS)}
    return {
        "name": stage.name,
        "kind": stage.kind,
        "title": stage.title,
        "inputs": list(stage.inputs),
        **measured,
        "licences": manifest.get("licences") or [],
        "notes": stage.notes,
    }


def _forecast(run: Run) -> dict[str, Any] | None:
    """Return the forecast of each stage beside the time that it took, and all stages together: by the clock
    if the run has noted it, else the sums over these stages.

    Return None if the run has no forecast.
    """
    forecasts = (run.summary.get("forecast") or {}).get("stages") or {}
    stages = []
    for stage in run.stages:
        if stage.name in forecasts and stage.manifest.get("seconds") is not None:
            stages.append(_stage_forecast(stage, forecasts[stage.name]))
    if not stages:
        return None
    sums: dict[str, Any] = {}
    for key in _DURATION_KEYS:
        sums[key] = round(sum(stage[key] for stage in stages), 1)
    return {**sums, **(run.summary.get("clock") or {}), "stages": stages}


def _stage_forecast(stage: StageView, forecast: dict[str, Any]) -> dict[str, Any]:
    """Return one stage's forecast beside its wall time (`took`) and its processor time (`processor`), all
    in seconds.
    """
    return {
        "name": stage.name,
        **{key: forecast[key] for key in _FORECAST_KEYS},
        "took": stage.manifest["seconds"],
        "processor": stage.manifest.get("cpu_seconds") or 0.0,
    }


def _cost(summary: dict[str, Any]) -> float | None:
    """Return the cost of the run, in the currency of its price per hour.

    Return None if the price or the run's time is not known.
    """
    price = summary.get("price_per_hour")
    seconds = summary.get("seconds")
    if price is None or seconds is None:
        return None
    return price * seconds / 3600
