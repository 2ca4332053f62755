"""The text of a plan: its conditions, its lines for people and data for programs, deadlines, and formats of
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date as Date
from typing import Any

from .options import usage_error

DAY = 86400  # seconds


@dataclass(frozen=True)
class Conditions:
    """What a plan is asked for: `Conditions("2048xH800", {"nvlink": "400"}, price=2.0, until="2027-03")`.

    `on` is the cluster, "" for this machine; `changes` are the properties that `--what-if` replaces. `price`
    is in dollars an hour of one chip (of the whole machine if `on` is ""). `until` is a deadline as a date.
    """

    on: str
    changes: dict[str, str]
    price: float | None
    until: str | None


@dataclass
class Answer:
    """A plan in two forms: `lines` for people and `data` for programs."""

    lines: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def say(self, name: str, text: str) -> None:
        """Append a line for people: `name` in a column of 14 characters, then `text`."""
        self.lines.append(f"{name:14} {text}".rstrip())


# ---------------------------------------------------------------- deadlines


def days_left(until: str) -> int:
    """Return the number of days from today to the date `until`.

    Raises a usage error if that day is not in the future.
    """
    left = (parse_day(until) - Date.today()).days
    if left <= 0:
        raise usage_error(f"--until {until}: that day has passed")
    return left


def add_deadline(answer: Answer, seconds: float, until: str, chips: int = 1) -> None:
    """Add to `answer` the share of the work that is done by the date `until` and, if that is not all of it,
    the chips that would finish it by then.

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
    """Return a phrase for the number of chips that would do in `left` seconds the work that takes `chips`
    chips `seconds` seconds.

    With one chip the phrase is a multiple, as the work may run on this machine.
    """
    if chips > 1:
        needed = int(-(-chips * seconds // left))  # rounded up
        return f"about {needed:,} chips"
    return f"{seconds / left:.2g} times as many chips, or as fast ones"


def parse_day(text: str) -> Date:
    """Return the date that a text such as 2027-03-01 names; 2027-03 and 2027 are the first day of the month
    or year.

    Raises a usage error for anything else.
    """
    parts = text.split("-")
    missing = ["01"] * (3 - len(parts))
    try:
        return Date.fromisoformat("-".join([*parts, *missing]))
    except ValueError:
        raise usage_error(f"{text}: no day; write it as 2027-03-01 or 2027-03") from None


# ---------------------------------------------------------------- numbers


def changes_text(changes: dict[str, str]) -> str:
    """Return changes as they are written on the command line: `nvlink=400, chip=H20`."""
    return ", ".join(f"{key}={value}" for key, value in changes.items())


def short(number: float) -> str:
    """Return a number with three significant digits and a letter for its thousands: `2.67M`."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{_three_digits(number / size)}{letter}"
    return _three_digits(number)


def _three_digits(number: float) -> str:
    """Return a number rounded to three significant digits, without an exponent where possible."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:g}"


def duration(seconds: float) -> str:
    """Return a duration as text, such as `2.4 days`, `36.0 h` or `80.0 min`.

    The unit is the largest one of which the duration is at least 1.5.
    """
    for unit, size in (("days", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
