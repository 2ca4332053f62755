"""Prices of chips and tokens: dated tables with sources (prices.yaml), never a guess.

A price without a date and a source is refused, and a chip that is not in the table has no price. Months are
written as YYYY-MM.
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
    """The price of an hour of one chip, in dollars: `Rental("H800", 2.0, 3.42, "2025-01", "...")`.

    Hosts ask between `low` and `high`.
    """

    chip: str
    low: float
    high: float
    date: str
    source: str

    @property
    def middle(self) -> float:
        """The geometric mean of the low and the high price, as prices of hosts differ by factors."""
        return (self.low * self.high) ** 0.5


@dataclass(frozen=True)
class Tariff:
    """Dollars for a million tokens of a model.

    Example: `Tariff("deepseek-r1", 0.14, 0.55, 2.19, "2025-03", "...")`. `cached` is the price of input
    tokens from the cache, `input` of other input tokens, and `output` of output tokens.
    """

    model: str
    cached: float
    input: float
    output: float
    date: str
    source: str

    def revenue(self, cached: float, fresh: float, output: float) -> float:
        """Return the dollars for numbers of tokens: cached input, uncached (`fresh`) input and output."""
        return (self.cached * cached + self.input * fresh + self.output * output) / MILLION


def rental(chip: str, price: float | None = None, until: str = FOREVER) -> Rental:
    """Return the latest price of an hour of `chip` that is dated no later than the month `until`.

    A `price` in dollars that the user gives is taken instead, without the table. Raises LimbeckError for a
    chip without a price.
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
    """Return the price of a model's tokens, converted to dollars.

    It is the latest price list of the model's own host that is in `currency` and dated no later than the
    month `until`. Raises LimbeckError for a model without a price.
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
    """Return how many units of `currency` one dollar buys. Raises LimbeckError for an unknown currency."""
    if currency == "USD":
        return 1.0
    for row in _table("exchange"):
        if row["currency"] == currency:
            return row["rate"]
    raise LimbeckError(f"{currency}: no rate in prices.yaml")


def _latest(rows: list[dict[str, Any]], until: str) -> dict[str, Any] | None:
    """Return the latest row that is dated no later than the month `until`; None if there is none."""
    past = [row for row in rows if str(row["date"]) <= until]
    return max(past, key=lambda row: str(row["date"]), default=None)


def _table(part: str) -> list[dict[str, Any]]:
    """Return the rows of the table `part` of prices.yaml: "rental", "tokens" or "exchange"."""
    return _tables()[part]


@cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    """Return all tables of prices.yaml. Raises LimbeckError for a price without a date or a source."""
    tables = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    for part, rows in tables.items():
        for row in rows:
            if not row.get("date") or not row.get("source"):
                raise LimbeckError(
                    f"{TABLE.name}: {part}: {row} has no date or no source; a price without them is no price"
                )
    return tables
