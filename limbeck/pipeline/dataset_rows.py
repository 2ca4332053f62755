"""Rows of training data: their ids, their text, how a share of them is drawn, and the rows that a finished
stage was trained on.

A row is one training example as a JSON object, written as one line of an artifact's `rows.jsonl`. Its id is
`SOURCE/PROBLEM#SAMPLE`: `clock/17#0` is the first sampled response to the problem `clock/17` of the problem
source `clock`.
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
    """Return the name of the problem source in the id of a row or of a problem.

    >>> source_of("clock/17#0")
    'clock'
    """
    return row_id.partition("/")[0]


def problem_of(row_id: str) -> str:
    """Return the id of the problem that a row answers. An id without `#SAMPLE` is returned unchanged.

    >>> problem_of("clock/17#0"), problem_of("clock/17")
    ('clock/17', 'clock/17')
    """
    return row_id.rpartition("#")[0] or row_id


def take_share(rows: Sequence[Row], part: float, seed: object) -> list[Row]:
    """Return a random `part` of the rows (1 = as many as there are), in an order drawn from `seed`. A part
    below 1 returns a random subset; a part above 1 repeats rows, so that 2.5 returns each row two or three
    times."""
    order = generator(seed, "share").permutation(len(rows))
    return [rows[order[i % len(rows)]] for i in range(round(part * len(rows)))]


def response_text(row: Mapping[str, Any]) -> str:
    """Return the response text of a row, or both response texts of a preference pair, joined by an empty
    line."""
    texts = [str(row[key]) for key in ("completion", "chosen", "rejected") if row.get(key)]
    return "\n\n".join(texts)


def training_rows(
    manifest: Mapping[str, Any], folders: Mapping[str, Path]
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield each row that a finished stage was trained on as (input stage, row, times per epoch).

    `manifest` is the finished stage's manifest, `folders` maps input names to the folders of their artifacts.
    An input that is missing from `folders` yields nothing.
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
    """Return the share of each input in the `rows` or `pairs` setting of a stage; an input that is named
    without a share has the share 1."""
    cited = settings.get("rows") or settings.get("pairs") or {}
    if isinstance(cited, dict):
        return cited
    if isinstance(cited, str):
        return {cited: 1.0}
    return dict.fromkeys(cited, 1.0)


def practised_problems(folder: Path) -> dict[str, int]:
    """Return the problems that a reinforcement-learning stage sampled, each with the number of training steps
    that used it. `folder` is the folder of the stage's artifact."""
    times: dict[str, int] = {}
    for step in read(folder / ASKED):
        for problem in dict.fromkeys(step["problems"]):
            times[problem] = times.get(problem, 0) + 1
    return times
