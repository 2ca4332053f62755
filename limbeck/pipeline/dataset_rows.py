"""Rows of training data: their ids, their text, the part that a share takes, and the rows a finished stage
learned from.

A row's id is `SOURCE/PROBLEM#SAMPLE`: `clock/17#0` is the first sampled response to the problem `clock/17` of
the source `clock`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..run_log import ASKED, read
from ..types import generator

ROWS = "rows.jsonl"  # in an artifact: the rows it gives to other stages
PROBLEMS = "problems.jsonl"  # in a screening's artifact: the problems it kept
Row = TypeVar("Row")


def source_of(row_id: str) -> str:
    """The problem source in the id of a row or of a problem.

    >>> source_of("clock/17#0")
    'clock'
    """
    return row_id.partition("/")[0]


def problem_of(row_id: str) -> str:
    """The id of the problem that a row answers; an id without a sample number stands for itself.

    >>> problem_of("clock/17#0"), problem_of("clock/17")
    ('clock/17', 'clock/17')
    """
    return row_id.rpartition("#")[0] or row_id


def take_share(rows: Sequence[Row], part: float, seed: object) -> list[Row]:
    """All rows for a share of 1, a random part of them below, and some rows several times above."""
    order = generator(seed, "share").permutation(len(rows))
    return [rows[order[i % len(rows)]] for i in range(round(part * len(rows)))]


def response_text(row: Mapping[str, Any]) -> str:
    """The response text of a row; both responses of a preference pair."""
    texts = [str(row[key]) for key in ("completion", "chosen", "rejected") if row.get(key)]
    return "\n\n".join(texts)


def training_rows(
    manifest: Mapping[str, Any], folders: Mapping[str, Path]
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield each row that a stage trained on as (input stage, row, times per epoch).

    `folders` maps input names to their artifacts' folders; an input that is missing there yields nothing.
    """
    dropped = manifest.get("decontamination", {}).get("dropped", {})
    for name, part in _shares(manifest["settings"]).items():
        if name not in folders:
            continue
        rows = [row for row in read(folders[name] / ROWS) if row["id"] not in dropped]
        if not rows:
            continue
        times = Counter(take_share(range(len(rows)), part, (manifest["seed"], name)))
        for i in sorted(times):
            yield name, rows[i], times[i]


def _shares(settings: Mapping[str, Any]) -> dict[str, float]:
    """The share of each input in a stage's `rows` or `pairs`; an input named without a share counts as 1."""
    cited = settings.get("rows") or settings.get("pairs") or {}
    if isinstance(cited, dict):
        return cited
    if isinstance(cited, str):
        return {cited: 1.0}
    return dict.fromkeys(cited, 1.0)


def practised_problems(folder: Path) -> dict[str, int]:
    """The problems that a model practised on by reinforcement, each with the number of steps that used it."""
    times: dict[str, int] = {}
    for step in read(folder / ASKED):
        for problem in dict.fromkeys(step["problems"]):
            times[problem] = times.get(problem, 0) + 1
    return times
