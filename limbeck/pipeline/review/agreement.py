"""How well reviewers agree, and how fast they are: from verdicts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ...eval.statistics import krippendorff, wilson
from .reviews import VERDICTS, Standing


@dataclass(frozen=True)
class Pace:
    """One person at one desk: `Pace("Ada", 40, {"accept": 31, "edit": 5, "reject": 4}, 12.5, 240.0, timed=40)`.

    `seconds` is the median time a row, `hourly` the rows in an hour at the mean time; both are None where no verdict tells
    how long it took, and `timed` says how many do.
    """

    reviewer: str
    rows: int
    counts: dict[str, int]
    seconds: float | None
    hourly: float | None
    timed: int


def paces(rows: Iterable[Standing]) -> list[Pace]:
    """Everybody who gave a verdict, the busiest first."""
    said: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name, entry in row.verdicts.items():
            said.setdefault(name, []).append(entry)
    return sorted(
        (_pace(name, entries) for name, entries in said.items()), key=lambda one: (-one.rows, one.reviewer)
    )


def _pace(name: str, entries: Sequence[dict[str, Any]]) -> Pace:
    times = [entry["seconds"] for entry in entries if entry.get("seconds")]
    counts = Counter(entry["verdict"] for entry in entries)
    return Pace(
        name,
        len(entries),
        {verdict: counts[verdict] for verdict in VERDICTS},
        median(times) if times else None,
        3600 * len(times) / sum(times) if times else None,
        len(times),
    )


def agreement(rows: Iterable[Standing]) -> dict[str, Any]:
    """`{"agreement": {"rows", "people", "same", "low", "high", "alpha"}}` over rows with several verdicts; empty without any.

    Everybody judged alone: nobody is shown what others said before. Resolutions come after that and do not count.
    `same` is the share of rows with one and the same verdict and its 95 % interval (Wilson), `alpha` Krippendorff's.
    """
    units = [row.verdicts for row in rows if len(row.verdicts) > 1]
    if not units:
        return {}
    labels = [[entry["verdict"] for entry in unit.values()] for unit in units]
    same = sum(len(set(values)) == 1 for values in labels) / len(labels)
    low, high = wilson(same, len(labels))
    people = len({name for unit in units for name in unit})
    return {
        "agreement": {
            "rows": len(units),
            "people": people,
            "same": same,
            "low": low,
            "high": high,
            "alpha": krippendorff(labels),
        }
    }
