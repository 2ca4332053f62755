"""Two models on the same problems: the paired difference of their accuracies, and the problems on which they
differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..eval.statistics import Interval, mean_interval, paired_difference, pass_at_k
from ..run_log import read
from .flips import Flip, Flips, sort
from .loaded_run import VERDICTS

Verdicts = dict[tuple[str, str], dict[str, dict[str, Any]]]  # (source, mode) -> problem -> row


@dataclass(frozen=True)
class PairedResult:
    """Two evaluations of one way of sampling on one source of problems, A and B.

    `PairedResult("clock", "t1", a, b, .12, .08, .16, flips)`: B is right on 12 points more of the problems
    than A, and the 95 % confidence interval of the difference is 8 to 16 points. `a` and `b` are the
    accuracies on the problems that both were asked; `flips` compares their first responses.
    """

    source: str
    mode: str
    a: Interval
    b: Interval
    difference: float
    low: float
    high: float
    flips: Flips

    @property
    def differs(self) -> bool:
        """True if the interval of the difference lies on one side of zero."""
        return self.low > 0 or self.high < 0


def read_verdicts(folder: Path) -> Verdicts:
    """Return the verdicts in an evaluation's folder; empty if it was written without them."""
    verdicts: Verdicts = {}
    for row in read(folder / VERDICTS):
        verdicts.setdefault((row["source"], row["mode"]), {})[row["problem"]] = row
    return verdicts


def compare(a: Verdicts, b: Verdicts) -> list[PairedResult]:
    """Return the comparison for each source and way of sampling in which both were asked the same problem."""
    results = []
    for (source, mode), before in a.items():
        after = b.get((source, mode), {})
        common = [problem for problem in before if problem in after]
        if common:
            results.append(_compare(source, mode, [(before[p], after[p]) for p in common]))
    return results


def _compare(source: str, mode: str, rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> PairedResult:
    """Return the comparison of pairs of rows, one pair for each problem."""
    values = [(_values(mode, before), _values(mode, after)) for before, after in rows]
    means = [(_mean(before), _mean(after)) for before, after in values]
    flips = [Flip(before["problem"], before["prompt"], before, after) for before, after in rows]
    return PairedResult(
        source,
        mode,
        mean_interval([before for before, _ in values]),
        mean_interval([after for _, after in values]),
        *paired_difference(means),
        sort(flips, is_right=lambda row: row["right"][0] > 0.5),
    )


def _values(mode: str, row: dict[str, Any]) -> list[float]:
    """Return the accuracies of the completions of a row; for pass@k, the estimate of pass@k alone."""
    right = row["right"]
    if not mode.startswith("pass@"):
        return right
    return [pass_at_k(len(right), int(sum(right)), int(mode.removeprefix("pass@")))]


def _mean(values: list[float]) -> float:
    """Return the mean of values."""
    return sum(values) / len(values)
