"""One page a run, and its numbers beside it: `index.html` for people, `report.json` for programs.

`report.json`, schema 1 (docs/reference/report.md tells every field):

    {"schema": 1, "name", "seed", "source": the headline problems, "story": {ROLE: MODEL},
     "models": {NAME: {"accuracy": {"t1" | "t06" | "greedy" | "pass@8" | "cons@8":
                {"mean", "low", "high", "n", "problems"}}, "length", "truncated", "format",
                "language_consistency", "attempts", "persist", "mixed", "parameters", "seconds",
                "tokens", "flops", "control", "other": {SOURCE: {MODE: ...}}}},
     "stages": [{"name", "kind", "title", "inputs", "key", "digest", "code_version", "seconds", "cpu_seconds",
                "peak_memory_bytes", "tokens", "flops", "joules", "licences", "notes"}],
     "seconds", "cpu_seconds", "peak_memory_bytes", "tokens", "flops", "joules", "cost", "machine",
     "forecast": {"seconds", "low", "high", "took", "processor": of the stages that were foreseen, "stages": [{"name", "seconds",
                  "low", "high", "took", "processor"}]} or null,
     "comparison": {"target": loss, "ways": {NAME: {"runs", "final_losses", "flops", "parameters",
                "reaches_target_after": FLOPs or null}}} or null,
     "alarms": [{"stage", "alarm", "first", "times"}], "not_shown": [sentence]}

What was not measured is null. A reader that knows schema 1 may meet new keys, never changed ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import comparison, page
from . import summary as story
from .loaded_run import MODES, Run, StageView

__all__ = ["SCHEMA", "StageView", "numbers", "write"]

SCHEMA = 1
_MEASURES = ("length", "truncated", "format", "language_consistency", "attempts", "persist", "mixed")
_COSTS = ("seconds", "cpu_seconds", "peak_memory_bytes", "tokens", "flops", "joules")


def write(folder: Path, stages: Sequence[StageView], recipe: dict[str, Any], summary: dict[str, Any]) -> Path:
    """Write both files into `folder` and return the page's path.

    `recipe` is the resolved one; `summary` holds the run's `seconds`, `peak_memory_bytes`, `machine`, and
    `price_per_hour` where one was given.
    """
    run = Run(tuple(stages), recipe, summary)
    told = numbers(run)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(told, ensure_ascii=False, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    path = folder / "index.html"
    path.write_text(page.render(run, told), encoding="utf-8")
    return path


def numbers(run: Run) -> dict[str, Any]:
    """The content of `report.json`."""
    return {
        "schema": SCHEMA,
        "name": run.recipe.get("name", ""),
        "seed": run.recipe.get("seed"),
        "source": run.sources[0] if run.sources else None,
        "story": run.cast,
        "models": {name: _model(run, name) for name in run.evaluations},
        "stages": [_stage(stage) for stage in run.stages],
        "seconds": run.summary.get("seconds"),
        "cpu_seconds": run.total("cpu_seconds"),
        "peak_memory_bytes": run.summary.get("peak_memory_bytes"),
        "tokens": run.total("tokens"),
        "flops": run.total("flops"),
        "joules": run.total("joules"),
        "cost": _cost(run.summary),
        "machine": run.summary.get("machine") or {},
        "forecast": _forecast(run),
        "comparison": comparison.compared(run),
        "alarms": [dict(zip(("stage", "alarm", "first", "times"), row, strict=True)) for row in run.alarms()],
        "not_shown": [text.en for text in story.not_shown(run)],
    }


def _model(run: Run, name: str) -> dict[str, Any]:
    return {
        "accuracy": _accuracies(run, name, None),
        **{measure: run.measure(name, measure) for measure in _MEASURES},
        "parameters": run.parameters(name),
        **{key: run.spent(name, key) for key in ("seconds", "tokens", "flops")},
        "control": run.evaluations[name].get("control"),
        "other": {source: _accuracies(run, name, source) for source in run.sources[1:]},
    }


def _accuracies(run: Run, model: str, source: str | None) -> dict[str, Any]:
    found = {mode: run.accuracy(model, mode, source) for mode in MODES}
    return {mode: asdict(interval) for mode, interval in found.items() if interval}


def _stage(stage: StageView) -> dict[str, Any]:
    manifest = stage.manifest
    return {
        "name": stage.name,
        "kind": stage.kind,
        "title": stage.title,
        "inputs": list(stage.inputs),
        **{key: manifest.get(key) for key in ("key", "digest", "code_version", *_COSTS)},
        "licences": manifest.get("licences") or [],
        "notes": stage.notes,
    }


def _forecast(run: Run) -> dict[str, Any] | None:
    """What was expected of each stage before it began, and what it took."""
    foreseen = (run.summary.get("forecast") or {}).get("stages") or {}
    stages = [
        {
            "name": s.name,
            **{key: foreseen[s.name][key] for key in ("seconds", "low", "high")},
            "took": s.manifest["seconds"],
            "processor": s.manifest.get("cpu_seconds") or 0.0,
        }
        for s in run.stages
        if s.name in foreseen and s.manifest.get("seconds") is not None
    ]
    if not stages:
        return None
    return {
        key: round(sum(stage[key] for stage in stages), 1)
        for key in ("seconds", "low", "high", "took", "processor")
    } | {"stages": stages}


def _cost(summary: dict[str, Any]) -> float | None:
    """In whatever money the price per hour was."""
    price, seconds = summary.get("price_per_hour"), summary.get("seconds")
    return None if price is None or seconds is None else price * seconds / 3600
