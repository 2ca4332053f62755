"""Rows that a stage learns from: which of them a share takes, and which artifact's manifest says so afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..run_log import ASKED, read
from ..types import generator

ROWS, PROBLEMS = "rows.jsonl", "problems.jsonl"
Row = TypeVar("Row")


def share_of(rows: Sequence[Row], part: float, seed: object) -> list[Row]:
    """All rows for a share of 1; a part of them, drawn at random, below; some of them repeatedly above."""
    order = generator(seed, "share").permutation(len(rows))
    return [rows[order[i % len(rows)]] for i in range(round(part * len(rows)))]


def said(row: Mapping[str, Any]) -> str:
    """The response of a row; of a pair both."""
    return "\n\n".join(str(row[key]) for key in ("completion", "chosen", "rejected") if row.get(key))


def learned_rows(
    manifest: Mapping[str, Any], folders: Mapping[str, Path]
) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Each row that a model learned from: the stage that gave it, the row, and how often an epoch has it.

    `folders` are those of the stage's inputs by name; one that is gone gives nothing.
    """
    settings, dropped = manifest["settings"], set(manifest.get("decontamination", {}).get("dropped", {}))
    given = settings.get("rows") or settings.get("pairs") or {}
    shares = (
        given if isinstance(given, dict) else dict.fromkeys([given] if isinstance(given, str) else given, 1.0)
    )
    for name, part in shares.items():
        rows = (
            [row for row in read(folders[name] / ROWS) if row["id"] not in dropped] if name in folders else []
        )
        times = Counter(share_of(range(len(rows)), part, (manifest["seed"], name)) if rows else [])
        for i in sorted(times):
            yield name, rows[i], times[i]


def asked_problems(folder: Path) -> dict[str, int]:
    """Problems that a model practised on by reinforcement, with the number of steps that asked each."""
    times: dict[str, int] = {}
    for step in read(folder / ASKED):
        for problem in set(step["problems"]):
            times[problem] = times.get(problem, 0) + 1
    return times
