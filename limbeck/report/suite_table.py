"""Tables of named benchmarks: each model's score, and published scores of other models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..eval.published import published_scores, scores_of
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


# ---------------------------------------------------------------- one's own models among published ones

VOTE = "cons@"  # the metrics of a majority vote
Column = tuple[str, str]  # the suite; the metric of a majority vote, "" for the suite's first metric


class ScoreRow(NamedTuple):
    """A model's scores: `ScoreRow("DeepSeek-R1", "[1]", {("math-500", ""): 97.3})`.

    `measured` says by which protocol one's own model was measured, or has the number of the source. A
    published score is in percent, one's own an interval."""

    model: str
    measured: str
    scores: Mapping[Column, Interval | float]


@dataclass(frozen=True)
class ScoreTable:
    """One's own models, then published scores of other models, on the same suites. `sources` are the sources
    of the published ones, by number."""

    columns: tuple[Column, ...]
    rows: tuple[ScoreRow, ...]
    sources: tuple[str, ...]


def score_table(measured: Mapping[str, Mapping[str, Any]]) -> ScoreTable:
    """Return the table of one's own models among published ones. `measured` has the results on suites of each
    model: model -> suite -> result."""
    columns = dict.fromkeys(column for results in measured.values() for column in _columns(results))
    own = [ScoreRow(model, _protocols(results), _columns(results)) for model, results in measured.items()]
    sources: dict[str, int] = {}
    others: dict[tuple[str, str], dict[Column, Interval | float]] = {}
    for one in published_scores():
        if (one.suite, one.metric) in columns:
            source = f"{one.title}, {one.url}, {one.date}: {one.how}"
            number = sources.setdefault(source, len(sources) + 1)
            others.setdefault((one.model, f"[{number}]"), {})[one.suite, one.metric] = one.score
    published = [ScoreRow(model, source, scores) for (model, source), scores in others.items()]
    return ScoreTable(tuple(columns), (*own, *published), tuple(sources))


def _columns(results: Mapping[str, Any]) -> dict[Column, Interval]:
    """Return the scores of one model by column: of each suite the first metric, and a majority vote."""
    scores = {}
    for suite, result in results.items():
        first = next(iter(result["metrics"]))
        for metric in result["metrics"]:
            if metric == first or metric.startswith(VOTE):
                scores[suite, "" if metric == first else metric] = _score(result, metric)
    return scores


def _protocols(results: Mapping[str, Any]) -> str:
    """Return the protocols that a model was measured by."""
    return ", ".join(dict.fromkeys(f"as {result['protocol']}" for result in results.values()))
