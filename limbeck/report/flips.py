"""Problems that flipped: wrong before and right after, or the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .history import Shown
from .loaded_run import samples_of


@dataclass(frozen=True)
class Flip:
    """One problem, both times: `Flip("clock/test-3", "use 6 1 5 make 3 ?", {"text": …}, {"text": …})`."""

    problem: str
    prompt: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Flips:
    """`won` went from wrong to right, `lost` from right to wrong; `held` and `missed` were right or wrong both times."""

    won: list[Flip]
    lost: list[Flip]
    held: int
    missed: int

    @property
    def asked(self) -> int:
        return len(self.won) + len(self.lost) + self.held + self.missed


def between(before: Path, after: Path) -> Flips:
    """Of the problems that two evaluations share, by the first response to each."""
    earlier, later = samples_of(before), samples_of(after)
    pairs = [Flip(name, row["prompt"], earlier[name], row) for name, row in later.items() if name in earlier]
    return Flips(
        won=[pair for pair in pairs if pair.after["correct"] and not pair.before["correct"]],
        lost=[pair for pair in pairs if pair.before["correct"] and not pair.after["correct"]],
        held=sum(pair.before["correct"] and pair.after["correct"] for pair in pairs),
        missed=sum(not pair.before["correct"] and not pair.after["correct"] for pair in pairs),
    )


def within(shown: Sequence[Shown]) -> Flips:
    """Of the problems that were met at two steps or more, first time against last: right is more than half of a group."""
    met: dict[str, list[Shown]] = {}
    for one in shown:
        met.setdefault(one.problem, []).append(one)
    pairs = [
        Flip(name, times[0].prompt, times[0], times[-1])
        for name, times in met.items()
        if times[-1].step > times[0].step
    ]
    return Flips(
        won=[pair for pair in pairs if pair.after.right > 0.5 >= pair.before.right],
        lost=[pair for pair in pairs if pair.before.right > 0.5 >= pair.after.right],
        held=sum(pair.before.right > 0.5 and pair.after.right > 0.5 for pair in pairs),
        missed=sum(pair.before.right <= 0.5 and pair.after.right <= 0.5 for pair in pairs),
    )
