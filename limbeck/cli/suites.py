"""The options and the result of `limbeck eval --suite`: a table, JSON, and a file of verdicts."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..eval.statistics import Interval
    from ..report.suite_table import Column, ScoreTable

Names = Annotated[
    list[str], typer.Option(help="a named benchmark, instead of --problems", show_default=False)
]
Data = Annotated[str, typer.Option(help="of a suite: the folder of its files as published")]
As = Annotated[str, typer.Option("--as", help="of a suite: measured as deepseek, lm-eval or lighteval does")]
Items = Annotated[int | None, typer.Option(min=1, help="of a suite: only the first items")]
Samples = Annotated[int | None, typer.Option(min=1, help="responses to each item or problem")]
Price = Annotated[
    float | None, typer.Option(min=0, help="of a suite: dollars an hour of this machine, for the cost")
]
Out = Annotated[Path | None, typer.Option(help="of a suite: a JSONL file for the verdict on each item")]


@dataclass(frozen=True)
class Shown:
    """How results are shown: dollars an hour of the machine, a JSONL file for the verdicts on the items, and
    the form of what is printed."""

    price: float | None
    out: Path | None
    markdown: bool
    as_json: bool


def show(model: str, folder: Path, options: Shown) -> None:
    """Print the results of the suites in the folder of an evaluation of a model: what each took, its metrics,
    and one table with published scores."""
    from ..eval.published import scores_of
    from ..pipeline.stages.evaluate import SUITE_ROWS
    from ..report.suite_table import score_table

    results = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["suites"]
    seconds = _seconds(folder)
    for name, result in results.items():
        result["published"] = [asdict(score) for score in scores_of(name)]
        result["seconds"] = seconds[name]
        if options.price is not None:
            result["dollars"] = options.price * seconds[name] / 3600
    if options.out:
        shutil.copyfile(folder / SUITE_ROWS, options.out)
    table = score_table({model: results})
    if options.as_json:
        print_json(results, table=table_to_json(table))
    elif options.markdown:
        print("\n".join(table_to_markdown(table)))
    else:
        print("\n".join([*chain.from_iterable(map(_lines, results.values())), "", *table_to_text(table)]))


def _seconds(folder: Path) -> dict[str, float]:
    """Return the seconds that each suite took, from the run log of the evaluation."""
    from ..run_log import METRICS, TIMING, read

    took = {row["step"]: row["seconds"] or 0.0 for row in read(folder / TIMING)}
    seconds: dict[str, float] = {}
    for row in read(folder / METRICS):
        seconds[row["source"]] = seconds.get(row["source"], 0.0) + took.get(row["step"], 0.0)
    return seconds


def _lines(result: dict[str, Any]) -> list[str]:
    """Return the lines of one suite: how it was measured, its metrics with 95 % intervals, what it took."""
    lines = [f"{result['suite']} as {result['protocol']}: {_source(result['source'])}"]
    lines += [f"  not as published: {change}" for change in result["changes"]]
    for name, metric in result["metrics"].items():
        interval = f"({metric['low']:.1%} to {metric['high']:.1%})"
        lines.append(
            f"  {name:30} {metric['mean']:6.1%}  {interval:20} n = {metric['n']}, items {metric['problems']}"
        )
    return [*lines, f"  {_took(result)}"]


def _source(source: dict[str, str]) -> str:
    """Return the title of a source with its version."""
    return f"{source['title']} ({source['version']})" if source["version"] else source["title"]


def _took(result: dict[str, Any]) -> str:
    """Return tokens, truncated share, seconds and cost in one line."""
    parts = [f"{result['seconds']:,.0f} s"]
    if "tokens" in result:
        parts.insert(0, f"{result['tokens']:,} tokens, {result['length']:,.0f} a response")
        parts.insert(1, f"{result['truncated']:.1%} cut off")
    if "dollars" in result:
        parts.append(f"${result['dollars']:,.2f}")
    return ", ".join(parts)


# ---------------------------------------------------------------- one table with published scores


def table_to_text(table: ScoreTable) -> Iterator[str]:
    """Yield the lines of a table for a terminal, scores in percent, and its sources."""
    heads = [_head(column) for column in table.columns]
    yield f"{'in percent':30} {'measured':16}" + "".join(f" {head:>18}" for head in heads)
    for row in table.rows:
        cells = (_percent(row.scores.get(column)) for column in table.columns)
        yield (f"{row.model:30} {row.measured:16}" + "".join(f" {cell:>18}" for cell in cells)).rstrip()
    for number, source in enumerate(table.sources, start=1):
        yield f"[{number}] {source}"


def table_to_markdown(table: ScoreTable) -> Iterator[str]:
    """Yield the lines of a table in Markdown, one's own scores with their intervals, and its sources."""
    heads = ["model", "measured", *map(_head, table.columns)]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in table.rows:
        cells = [_with_interval(row.scores.get(column)) for column in table.columns]
        yield f"| {' | '.join([row.model, row.measured, *cells])} |"
    yield ""
    for number, source in enumerate(table.sources, start=1):
        yield f"- [{number}] {source}"


def table_to_json(table: ScoreTable) -> dict[str, Any]:
    """Return a table as a JSON object: published scores are in percent, one's own have shares from 0 to 1."""
    rows = []
    for row in table.rows:
        scores = {
            _head(column): score if isinstance(score, float) else asdict(score)
            for column, score in row.scores.items()
        }
        rows.append({"model": row.model, "measured": row.measured, "scores": scores})
    return {"columns": list(map(_head, table.columns)), "rows": rows, "sources": list(table.sources)}


def _head(column: Column) -> str:
    """Return the head of a column: `aime-2024 cons@64`."""
    return " ".join(filter(None, column))


def _percent(score: Interval | float | None) -> str:
    """Return a score in percent, "" for none."""
    if score is None:
        return ""
    return f"{score:.1f}" if isinstance(score, float) else f"{100 * score.mean:.1f}"


def _with_interval(score: Interval | float | None) -> str:
    """Return a score in percent; one's own with its interval and the number of responses."""
    if score is None or isinstance(score, float):
        return _percent(score)
    return f"**{_percent(score)}** ({100 * score.low:.1f} to {100 * score.high:.1f}, n = {score.n})"
