"""The text of a plan: its conditions, its lines for people and data for programs, deadlines and numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date as Date
from typing import Any

from .options import usage_error

DAY = 86400  # seconds


@dataclass(frozen=True)
class Conditions:
    """Conditions of a plan: `Conditions("2048xH800", {"nvlink": "400"}, price=2.0, until="2027-03")`.

    `on` is the cluster ("" for this machine), `changes` those of `--what-if`; `price` is in dollars an hour
    of a chip, or of this machine.
    """

    on: str
    changes: dict[str, str]
    price: float | None
    until: str | None


@dataclass
class Answer:
    """A plan as lines for people and as data for programs."""

    lines: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def say(self, name: str, text: str) -> None:
        """Add a line with a name in front."""
        self.lines.append(f"{name:14} {text}".rstrip())


# ---------------------------------------------------------------- deadlines


def days_left(until: str) -> int:
    """Days from today to `until`; an error if it has passed."""
    left = (parse_day(until) - Date.today()).days
    if left <= 0:
        raise usage_error(f"--until {until}: that day has passed")
    return left


def add_deadline(answer: Answer, seconds: float, until: str, chips: int = 1) -> None:
    """Add the share of the work that is done by `until`, and the chips that would finish it by then.

    `seconds` is the time of the whole work on `chips` chips.
    """
    left = days_left(until) * DAY
    share = min(1.0, left / seconds)
    text = "all of it is done"
    if share < 1:
        text = f"{share:.0%} is done; to be through by then takes {_chips_needed(seconds, left, chips)}"
    day = parse_day(until)
    answer.data["until"] = {"date": str(day), "share": share}
    answer.say("until", f"{day}, {left / DAY:.0f} days from today: {text}")


def _chips_needed(seconds: float, left: int, chips: int) -> str:
    """The chips that do in `left` seconds the work that `chips` chips do in `seconds`."""
    if chips > 1:
        needed = int(-(-chips * seconds // left))  # rounded up
        return f"about {needed:,} chips"
    return f"{seconds / left:.2g} times as many chips, or as fast ones"


def parse_day(text: str) -> Date:
    """The day of a date such as 2027-03-01, or the first day of 2027-03 or 2027."""
    parts = text.split("-")
    missing = ["01"] * (3 - len(parts))
    try:
        return Date.fromisoformat("-".join([*parts, *missing]))
    except ValueError:
        raise usage_error(f"{text}: no day; write it as 2027-03-01 or 2027-03") from None


# ---------------------------------------------------------------- numbers


def changes_text(changes: dict[str, str]) -> str:
    """Changes as they are written on the command line: `nvlink=400, chip=H20`."""
    return ", ".join(f"{key}={value}" for key, value in changes.items())


def short(number: float) -> str:
    """A number of three digits and a letter: `2.67M`."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{_three_digits(number / size)}{letter}"
    return _three_digits(number)


def _three_digits(number: float) -> str:
    """A number rounded to three digits, without an exponent where possible."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:g}"


def duration(seconds: float) -> str:
    """A duration in the largest unit of which it is 1.5 or more: `2.4 days`, `36.0 h`, `80.0 min`."""
    for unit, size in (("days", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
