"""The page that compares several runs: one chart of a metric, their accuracies, and their settings."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from markupsafe import Markup

from ...pipeline import run_state, run_table, run_view
from ...pipeline.run_state import RunState
from ...report import charts
from ...report.history import History
from ...types import LimbeckError
from ..app_state import AppState
from ..pages import render

MOST = len(charts.HUES)  # runs in one chart: as many as there are colours
LEARNING = ("pretrain", "rl", "sft", "dpo", "distill", "reward")  # kinds of stages whose metrics are curves
PREFERRED = ("accuracy", "reward", "loss")  # metrics that are drawn unless another one is chosen
SHARES = {column for panel in run_view.PANELS if panel.scale == "share" for column in panel.columns}
LOGARITHMIC = {column for panel in run_view.PANELS if panel.scale == "log" for column in panel.columns}
# matplotlib draws with settings that belong to the whole process
_DRAWING = threading.Lock()

Histories = Mapping[str, Mapping[str, History]]  # run -> stage -> history


def routes(state: AppState) -> APIRouter:
    """Return the router of the page `/runs/-/compare`; no run can have the name `-`."""
    router = APIRouter(include_in_schema=False)

    @router.get("/runs/-/compare")
    def compare(
        request: Request, run: Annotated[list[str] | None, Query()] = None, metric: str = ""
    ) -> Response:
        try:
            runs = _chosen(state.runs, run or [])
        except LimbeckError as error:
            return _refusal(request, str(error))
        return render(request, "runs_compare.html.jinja", **_values(runs, metric))

    return router


def _refusal(request: Request, sentence: str) -> Response:
    return render(request, "runs_lost.html.jinja", 400, sentence=sentence)


def _chosen(home: Path, names: Sequence[str]) -> dict[str, RunState]:
    """Return the chosen runs in `home` by name. Raises LimbeckError for none, too many or unknown ones."""
    names = list(dict.fromkeys(names))
    folders = {folder.name: folder for folder in run_state.list_runs(home)}
    unknown = [name for name in names if name not in folders]
    if unknown:
        raise LimbeckError(f"there is no run {unknown[0]} in {home}; choose runs of the list")
    if not 1 <= len(names) <= MOST:
        raise LimbeckError(f"{len(names)} runs are chosen; choose 1 to {MOST} of the list")
    return {name: run_state.look(folders[name]) for name in names}


def _values(runs: Mapping[str, RunState], metric: str) -> dict[str, Any]:
    """Return the template values of the page for the chosen runs and the metric `STAGE/METRIC`."""
    histories = {name: _histories(run) for name, run in runs.items()}
    metrics = _metrics(histories)
    if metric not in metrics:
        metric = _preferred(metrics)
    return {
        "runs": list(runs),
        "tones": dict(zip(runs, charts.HUES, strict=False)),
        "metrics": list(metrics),
        "metric": metric,
        "chart": _draw(histories, metric) if metric else Markup(),
        "settings": _transposed(run_table.compare(runs)),
        "accuracies": _accuracies(runs),
    }


def _histories(run: RunState) -> dict[str, History]:
    """Return the metrics of each learning stage that has logged any, by the stage's name, RL first."""
    stages = [stage for stage in run.stages if stage.folder and stage.kind in LEARNING]
    lines = [run_view.line_of(run, stage, alive=False) for stage in stages]
    lines.sort(key=lambda line: line.kind != "rl")
    return {line.name: line.history for line in lines if line.history.steps}


def _metrics(histories: Histories) -> dict[str, int]:
    """Return how many of the runs have a metric, by `STAGE/METRIC`; those that most have come first."""
    counts: dict[str, int] = {}
    for stages in histories.values():
        for stage, history in stages.items():
            for column in history.columns:
                counts[f"{stage}/{column}"] = counts.get(f"{stage}/{column}", 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _preferred(metrics: Mapping[str, int]) -> str:
    """Return the metric to draw by default, one that most runs have; "" if there is none."""
    common = [name for name, count in metrics.items() if count == max(metrics.values())]
    for wanted in PREFERRED:
        for metric in common:
            if metric.endswith(f"/{wanted}"):
                return metric
    return next(iter(common), "")


def _draw(histories: Histories, metric: str) -> Markup:
    """Draw one curve of the metric `STAGE/METRIC` for each run that has it."""
    stage, _, column = metric.rpartition("/")
    lines = []
    for (name, stages), tone in zip(histories.items(), charts.HUES, strict=False):
        history = stages.get(stage)
        if history and column in history.columns:
            values = np.array(history.columns[column])
            finite = np.isfinite(values)
            steps = np.array(history.steps)[finite]
            lines.append(charts.Line(name, steps, values[finite], tone))
    drawable = [line for line in lines if len(line.x)]
    if not drawable:
        return Markup()
    with _DRAWING:
        chart = charts.curves(drawable, percent=column in SHARES, log=column in LOGARITHMIC)
    names = [line.label for line in drawable]
    return charts.as_attributes(chart, f"{metric}: {', '.join(names)}")


def _transposed(settings: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return the settings by key and then by run."""
    table: dict[str, dict[str, str]] = {}
    for run, values in settings.items():
        for key, value in values.items():
            table.setdefault(key, {})[run] = value
    return table


def _accuracies(runs: Mapping[str, RunState]) -> dict[str, dict[str, run_table.Accuracy]]:
    """Return the accuracies by model (with its problems and mode) and then by run."""
    table: dict[str, dict[str, run_table.Accuracy]] = {}
    for name, run in runs.items():
        for accuracy in run_table.accuracies(run):
            key = f"{accuracy.model} · {accuracy.source} · {accuracy.mode}"
            table.setdefault(key, {})[name] = accuracy
    return table
