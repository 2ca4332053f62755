"""The options and the result of `limbeck eval --suite`: a table, JSON, and a file of verdicts."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import print_json

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


def show(folder: Path, price: float | None, out: Path | None, as_json: bool) -> None:
    """Print the results of the suites in the folder of an evaluation, with the seconds that each took and,
    given the price of an hour in dollars, its cost. `out` is the file for the verdicts on the items."""
    from ..eval.published import scores_of
    from ..pipeline.stages.evaluate import SUITE_ROWS

    results = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["suites"]
    seconds = _seconds(folder)
    for name, result in results.items():
        result["published"] = [asdict(score) for score in scores_of(name)]
        result["seconds"] = seconds[name]
        if price is not None:
            result["dollars"] = price * seconds[name] / 3600
    if out:
        shutil.copyfile(folder / SUITE_ROWS, out)
    if as_json:
        print_json(results)
        return
    for result in results.values():
        print("\n".join(_lines(result)))


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
    lines.append(f"  {_took(result)}")
    return lines + _published(result["published"])


def _published(scores: list[dict[str, Any]]) -> list[str]:
    """Return the lines of published scores, and of their sources, by number."""
    if not scores:
        return []
    sources = list(dict.fromkeys(f"{score['title']}, {score['date']}: {score['how']}" for score in scores))
    lines = ["  published, each by its own protocol:"]
    for score in scores:
        number = sources.index(f"{score['title']}, {score['date']}: {score['how']}") + 1
        lines.append(f"    {score['model']:28} {score['score']:5.1f}%  [{number}]")
    return lines + [f"    [{number}] {source}" for number, source in enumerate(sources, start=1)]


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
