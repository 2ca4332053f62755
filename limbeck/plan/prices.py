"""Prices of chips and tokens: dated tables with sources (prices.yaml), never a guess.

A price without a date and a source is refused; a chip that the table does not have has no price at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..types import LimbeckError

TABLE = Path(__file__).with_name("prices.yaml")
MILLION = 1e6  # tokens
FOREVER = "9999"  # a month after all others


@dataclass(frozen=True)
class Rental:
    """The price of an hour of one chip, in dollars: `Rental("H800", 2.0, 3.42, "2025-01", "...")`."""

    chip: str
    low: float
    high: float
    date: str
    source: str

    @property
    def middle(self) -> float:
        """The geometric mean: prices of hosts differ by factors."""
        return (self.low * self.high) ** 0.5


@dataclass(frozen=True)
class Tariff:
    """Dollars for a million tokens: `Tariff("deepseek-r1", 0.14, 0.55, 2.19, "2025-03", "...")`."""

    model: str
    cached: float
    input: float
    output: float
    date: str
    source: str

    def revenue(self, cached: float, fresh: float, output: float) -> float:
        """Dollars for tokens: cached input, uncached input, output."""
        return (self.cached * cached + self.input * fresh + self.output * output) / MILLION


def rental(chip: str, price: float | None = None, until: str = FOREVER) -> Rental:
    """The latest price of a chip up to a month, or a `price` of the user's, which needs no table.

    Raises LimbeckError for a chip without a price.
    """
    if price is not None:
        return Rental(chip, price, price, "", "given")
    family = chip.partition("-")[0].upper()
    rows = [row for row in _table("rental") if str(row["chip"]) == family]
    row = _latest(rows, until)
    if row is None:
        raise LimbeckError(f"{chip}: no dated price of an hour in prices.yaml; say one with --price")
    dollar = exchange(row["currency"])
    return Rental(chip, row["low"] / dollar, row["high"] / dollar, str(row["date"]), row["source"])


def tariff(model: str, currency: str = "USD", until: str = FOREVER) -> Tariff:
    """The price of a model's tokens in its own host's latest list up to a month, in dollars.

    `currency` selects one of the host's lists. Raises LimbeckError for a model without a price.
    """
    table = _table("tokens")
    rows = [row for row in table if row["model"] == model and row["currency"] == currency]
    row = _latest(rows, until)
    if row is None:
        known = ", ".join(sorted({row["model"] for row in table}))
        raise LimbeckError(
            f"{model}: no dated price of its tokens in {currency} in prices.yaml; there are {known}"
        )
    dollar = exchange(currency)
    return Tariff(
        model=model,
        cached=row.get("cached", row["input"]) / dollar,
        input=row["input"] / dollar,
        output=row["output"] / dollar,
        date=str(row["date"]),
        source=row["source"],
    )


def exchange(currency: str) -> float:
    """Units of a currency for one dollar. Raises LimbeckError for an unknown one."""
    if currency == "USD":
        return 1.0
    for row in _table("exchange"):
        if row["currency"] == currency:
            return row["rate"]
    raise LimbeckError(f"{currency}: no rate in prices.yaml")


def _latest(rows: list[dict[str, Any]], until: str) -> dict[str, Any] | None:
    """The latest row up to a month; None if there is none."""
    past = [row for row in rows if str(row["date"]) <= until]
    return max(past, key=lambda row: str(row["date"]), default=None)


def _table(part: str) -> list[dict[str, Any]]:
    """The rows of one table of prices.yaml."""
    return _tables()[part]


@cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    """The content of prices.yaml. Raises LimbeckError for a price without a date or a source."""
    tables = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    for part, rows in tables.items():
        for row in rows:
            if not row.get("date") or not row.get("source"):
                raise LimbeckError(
                    f"{TABLE.name}: {part}: {row} has no date or no source; a price without them is no price"
                )
    return tables
