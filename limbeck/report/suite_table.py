"""The report's table of named benchmarks: each model's score, and published scores of other models."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..eval.published import scores_of
from ..eval.statistics import Interval
from .loaded_run import Run


class SuiteRow(NamedTuple):
    """One row of the table: the suite and how it was measured, the first metric of each model (None if it was
    not measured), and the published scores in one line."""

    name: str
    scores: list[Interval | None]
    published: str


def suite_rows(run: Run) -> list[SuiteRow]:
    """Return a row for each suite that any model was measured on, in the recipe's order."""
    results = [evaluation.get("suites", {}) for evaluation in run.evaluations.values()]
    rows = []
    for suite in dict.fromkeys(name for result in results for name in result):
        measured = [result.get(suite) for result in results]
        first = next(result for result in measured if result)
        metric = next(iter(first["metrics"]))
        name = f"{suite} ({first['protocol']}, {metric})"
        rows.append(SuiteRow(name, [_score(result, metric) for result in measured], _published(suite)))
    return rows


def _score(result: dict[str, Any] | None, metric: str) -> Interval | None:
    """Return a metric of a suite's result; None if there is no result."""
    return Interval(**result["metrics"][metric]) if result else None


def _published(suite: str) -> str:
    """Return the published scores on a suite in one line, each with the year and month of its source."""
    return " · ".join(f"{one.model} {one.score:.1f} ({one.date[:7]})" for one in scores_of(suite))
