"""Problems that flipped between two measurements: wrong before and right after, or the other way round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .history import Shown
from .loaded_run import samples_of


@dataclass(frozen=True)
class Flip:
    """One problem at both times: `Flip("clock/test-3", "use 6 1 5 make 3 ?", {"text": …}, {"text": …})`."""

    problem: str
    prompt: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Flips:
    """Problems by outcome at both times.

    `won` went from wrong to right and `lost` from right to wrong; `held` counts those that were right both
    times, `missed` those that were wrong both times.
    """

    won: list[Flip]
    lost: list[Flip]
    held: int
    missed: int

    @property
    def asked(self) -> int:
        """Number of problems that were compared."""
        return len(self.won) + len(self.lost) + self.held + self.missed


def between(before: Path, after: Path) -> Flips:
    """Flips between two evaluations, over their common problems and the first response to each."""
    earlier = samples_of(before)
    pairs = []
    for name, row in samples_of(after).items():
        if name in earlier:
            pairs.append(Flip(name, row["prompt"], earlier[name], row))
    return _sort(pairs, is_right=lambda row: row["correct"])


def within(shown: Sequence[Shown]) -> Flips:
    """Flips within one stage, over the problems recorded at two steps or more: first step against last.

    A problem is right if more than half of the group's responses are.
    """
    groups: dict[str, list[Shown]] = {}
    for group in shown:
        groups.setdefault(group.problem, []).append(group)
    pairs = []
    for name, times in groups.items():
        first = times[0]
        last = times[-1]
        if last.step > first.step:
            pairs.append(Flip(name, first.prompt, first, last))
    return _sort(pairs, is_right=lambda group: group.right > 0.5)


def _sort(pairs: list[Flip], is_right: Callable[[Any], bool]) -> Flips:
    """The pairs by outcome; `is_right` judges a `before` or an `after`."""
    won = []
    lost = []
    held = 0
    missed = 0
    for pair in pairs:
        before = is_right(pair.before)
        after = is_right(pair.after)
        if before and after:
            held += 1
        elif before:
            lost.append(pair)
        elif after:
            won.append(pair)
        else:
            missed += 1
    return Flips(won, lost, held, missed)
