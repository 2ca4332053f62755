"""The agreement and the speed of reviewers, computed from their verdicts (accept, edit or reject) on rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ...eval.statistics import krippendorff, wilson
from .review_queue import VERDICTS, ReviewState


@dataclass(frozen=True)
class Pace:
    """The speed of one reviewer in one queue:
    `Pace("Ada", 40, {"accept": 31, "edit": 5, "reject": 4}, 12.5, 240.0, timed=40)` reviewed 40 rows.

    `counts` is the number of verdicts of each kind. `seconds` is the median time per row, `hourly` the rows
    per hour at the mean time; both are None if no verdict has a time. `timed` is the number of verdicts that
    have one.
    """

    reviewer: str
    rows: int
    counts: dict[str, int]
    seconds: float | None
    hourly: float | None
    timed: int


def paces(rows: Iterable[ReviewState]) -> list[Pace]:
    """Return the speed of every reviewer, the one with most rows first."""
    by_reviewer: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for reviewer, verdict in row.verdicts.items():
            by_reviewer.setdefault(reviewer, []).append(verdict)
    measured = [_pace(reviewer, verdicts) for reviewer, verdicts in by_reviewer.items()]
    return sorted(measured, key=lambda pace: (-pace.rows, pace.reviewer))


def _pace(reviewer: str, verdicts: Sequence[dict[str, Any]]) -> Pace:
    """Compute the speed of one reviewer from their verdicts."""
    times = [verdict["seconds"] for verdict in verdicts if verdict.get("seconds")]
    counts = Counter(verdict["verdict"] for verdict in verdicts)
    return Pace(
        reviewer=reviewer,
        rows=len(verdicts),
        counts={kind: counts[kind] for kind in VERDICTS},
        seconds=median(times) if times else None,
        hourly=3600 * len(times) / sum(times) if times else None,
        timed=len(times),
    )


def agreement(rows: Iterable[ReviewState]) -> dict[str, Any]:
    """Return how far the reviewers agree, over the rows that several people reviewed:
    `{"agreement": {"rows", "people", "same", "low", "high", "alpha"}}`, or {} if there is no such row.

    Reviewers do not see the verdicts of others before they give their own. Verdicts that settle a dispute are
    given later and do not count. `same` is the share of rows whose verdicts are all the same, `low` to `high`
    its 95 % interval (Wilson), and `alpha` is Krippendorff's alpha.
    """
    units = [row.verdicts for row in rows if len(row.verdicts) > 1]
    if not units:
        return {}
    reviewers: set[str] = set()
    labels = []
    for unit in units:
        reviewers.update(unit)
        labels.append([verdict["verdict"] for verdict in unit.values()])
    same = sum(len(set(values)) == 1 for values in labels) / len(labels)
    low, high = wilson(same, len(labels))
    measured = {
        "rows": len(units),
        "people": len(reviewers),
        "same": same,
        "low": low,
        "high": high,
        "alpha": krippendorff(labels),
    }
    return {"agreement": measured}
