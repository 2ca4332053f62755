"""Problems that flipped between two measurements: wrong before and right after, or right before and wrong
after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .history import Shown
from .loaded_run import samples_of


@dataclass(frozen=True)
class Flip:
    """One problem in both measurements.

    `Flip("clock/test-3", "use 6 1 5 make 3 ?", {"text": …}, {"text": …})`. `before` and `after` are what was
    recorded for the problem: a sampled response as a dict (`between`) or a group of responses (`within`).
    """

    problem: str
    prompt: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Flips:
    """The compared problems, sorted by their results in both measurements.

    `won` are the problems that went from wrong to right and `lost` those that went from right to wrong;
    `held` is the number of problems that were right both times, `missed` the number that were wrong both
    times.
    """

    won: list[Flip]
    lost: list[Flip]
    held: int
    missed: int

    @property
    def asked(self) -> int:
        """The number of problems that were compared."""
        return len(self.won) + len(self.lost) + self.held + self.missed


def between(before: Path, after: Path) -> Flips:
    """Return the flips between two evaluations, given as the folders of their stages.

    Only problems that both evaluations contain are compared, by the first response to each.
    """
    earlier = samples_of(before)
    pairs = []
    for name, row in samples_of(after).items():
        if name in earlier:
            pairs.append(Flip(name, row["prompt"], earlier[name], row))
    return sort(pairs, is_right=lambda row: row["correct"])


def within(shown: Sequence[Shown]) -> Flips:
    """Return the flips within one training stage, from the groups of responses that it recorded.

    Each problem recorded at two or more steps is compared: its first group with its last. A problem is right
    if more than half of the group's responses are right.
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
    return sort(pairs, is_right=lambda group: group.right > 0.5)


def sort(pairs: list[Flip], is_right: Callable[[Any], bool]) -> Flips:
    """Sort the pairs by their results in both measurements.

    `is_right` says whether a pair's `before` or `after` is right.
    """
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
