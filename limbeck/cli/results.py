"""The command `limbeck results`: all that the evaluations of runs measured, as one table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import suites
from .options import RUNS, AsJson, Home, print_json, usage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from ..pipeline.evaluation_table import EvaluationRow, Measure

app = typer.Typer()

TITLES = {
    "t1": "T = 1",
    "t06": "T = 0.6",
    "greedy": "greedy",
    "pass@8": "pass@8",
    "length": "tokens",
    "thought_length": "tokens of the thought",
    "language_consistency": "one language",
    "truncated": "cut off",
}
SHARES = ("t1", "t06", "greedy", "pass@8", "language_consistency", "truncated")


@app.command()
def results(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="runs: their folders or names in runs")
    ],
    pool: Annotated[
        bool, typer.Option("--pool", help="the mean over runs of one recipe with different seeds")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="a Markdown table, for documents")] = False,
    stat: Annotated[
        list[str], typer.Option(help="also this statistic of the task, such as attempts", show_default=False)
    ] = [],  # noqa: B006
    matrix: Annotated[
        list[str],
        typer.Option(help="a Markdown table of this measure, a column for each model", show_default=False),
    ] = [],  # noqa: B006
    runs: Home = RUNS,
    as_json: AsJson = False,
) -> None:
    """Show all that the evaluations of runs measured, with 95 % intervals.

    These are the accuracy at T = 1, at T = 0.6, greedy and pass@8, tokens of the completion and of its
    thought, the share of words in the question's language, and the share cut off.

    Below stand the scores on named benchmarks, in one table with published ones.

    With several runs there is a row for each; --pool shows the mean over their seeds, the standard deviation
    between them, the lowest and the highest.

    For instance: `limbeck results quickstart --markdown`, `limbeck results quickstart --matrix t1`,
    `limbeck results mine-0 mine-1 mine-2 --pool`
    """
    from ..pipeline import evaluation_table as table
    from ..report.suite_table import score_table

    looked = [table.look(_folder(name, runs)) for name in names]
    rows = table.pool(looked) if pool else [row for run in looked for row in table.rows_of(run)]
    _check_statistics("--stat", stat, rows)
    _check_statistics("--matrix", [name for name in matrix if name not in TITLES], rows)
    measures = [*TITLES, *stat]
    benchmarks = score_table(table.suites_of(looked))
    if as_json:
        print_json([asdict(row) for row in rows], benchmarks=suites.table_to_json(benchmarks))
        return
    if matrix:
        print("\n\n".join("\n".join(to_matrix(rows, name)) for name in matrix))
        return
    lines = to_markdown(rows, measures) if markdown else [_line(row) for row in _flat(rows, measures)]
    if benchmarks.columns:
        to_lines = suites.table_to_markdown if markdown else suites.table_to_text
        lines += ["", *to_lines(benchmarks)]
    print("\n".join(lines))


def _folder(name: str, runs: Path) -> Path:
    """Return the folder of a run: that path, or the folder of that name in `runs`. Raises a usage error if it
    is no run."""
    for folder in (Path(name), runs / name):
        if (folder / "recipe.yaml").exists():
            return folder
    raise usage_error(f"{name} is no run: neither it nor {runs / name} has a recipe.yaml; give a run's name")


def _check_statistics(option: str, stats: Sequence[str], rows: Sequence[EvaluationRow]) -> None:
    """Raise a usage error for a statistic that no evaluation has."""
    known = dict.fromkeys(name for row in rows for name in row.measures if name not in TITLES)
    for stat in stats:
        if stat not in known:
            raise usage_error(
                f"{option} {stat}: no evaluation has it; they have {', '.join(known) or 'none'}"
            )


# ---------------------------------------------------------------- the terminal


def _flat(rows: Sequence[EvaluationRow], measures: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one dict for each row and measure."""
    several = len({row.run for row in rows}) > 1
    for row in rows:
        model = f"{row.run}/{row.model}" if several else row.model
        for name in measures:
            if name in row.measures:
                yield {"source": row.source, "model": model, "name": name, "measure": row.measures[name]}


def _line(row: dict[str, Any]) -> str:
    """Return the line of one measure."""
    title = TITLES.get(row["name"], row["name"])
    return f"{row['source']:16} {row['model']:20} {title:22} {cell(row['name'], row['measure'])}"


# ---------------------------------------------------------------- Markdown


def to_markdown(rows: Sequence[EvaluationRow], measures: Sequence[str]) -> list[str]:
    """Return the lines of a Markdown table: a row for each source and model, a column for each measure that
    any of them has. Runs and evaluate stages are columns where there are several."""
    labels = _labels(rows)
    shown = [name for name in measures if any(name in row.measures for row in rows)]
    heads = [*labels, *(TITLES.get(name, name) for name in shown)]
    lines = [_markdown_row(heads), "|" + "---|" * len(heads)]
    for row, *names in zip(rows, *labels.values(), strict=True):
        cells = [cell(name, row.measures[name]) if name in row.measures else "" for name in shown]
        lines.append(_markdown_row([*names, *cells]))
    return lines


def to_matrix(rows: Sequence[EvaluationRow], name: str) -> list[str]:
    """Return the lines of a Markdown table of one measure: a row for each source, a column for each model,
    in the order of their evaluations."""
    several = len({row.run for row in rows}) > 1
    titles = [f"{row.run}/{row.model}" if several else row.model for row in rows]
    table: dict[str, dict[str, str]] = {}
    for row, title in zip(rows, titles, strict=True):
        if name in row.measures:
            table.setdefault(row.source, {})[title] = cell(name, row.measures[name])
    models = list(dict.fromkeys(titles))
    lines = [_markdown_row([TITLES.get(name, name), *models]), "|" + "---|" * (1 + len(models))]
    for source, cells in table.items():
        lines.append(_markdown_row([source, *(cells.get(model, "") for model in models)]))
    return lines


def _labels(rows: Sequence[EvaluationRow]) -> dict[str, list[str]]:
    """Return the columns that name the rows, by their heads."""
    labels = {"problems": [row.source for row in rows], "model": [row.model for row in rows]}
    if len({row.run for row in rows}) > 1:
        labels["run"] = [row.run for row in rows]
        labels["seed"] = [str(row.seed) for row in rows]
    if len({row.evaluation for row in rows}) > 1:
        labels["evaluation"] = [row.evaluation for row in rows]
    return labels


def _markdown_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in cells)} |"


def cell(name: str, measure: Measure) -> str:
    """Return a measure as text: `80.6% (77.8% to 83.4%, n = 1020)`; of several seeds `80.6% ± 2.1 (78.9% to
    83.1%, 3 seeds)`."""
    text = _number(name, measure.mean)
    ends = []
    if measure.deviation is not None:
        text += f" ± {_number(name, measure.deviation).removesuffix('%')}"
    if measure.low is not None:
        ends.append(f"{_number(name, measure.low)} to {_number(name, measure.high)}")
    if measure.deviation is not None:
        ends.append(f"{measure.seeds} seeds")
    elif measure.n is not None:
        ends.append(f"n = {measure.n}")
    if name == "pass@8" and measure.way != "pass@8":
        ends.append(TITLES[measure.way])
    return f"{text} ({', '.join(ends)})" if ends else text


def _number(name: str, value: float) -> str:
    """Return a share in percent, a length with one decimal, another statistic with two."""
    if name in SHARES:
        return f"{value:.1%}"
    return f"{value:.1f}" if name.endswith("length") else f"{value:.2f}"
