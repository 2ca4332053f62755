"""What chips and tokens cost: dated, sourced tables (prices.yaml), always with a range, and never a guess.

A price without a date and a source is refused; a chip that the table does not know has no price at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..types import LimbeckError

TABLE = Path(__file__).with_name("prices.yaml")
MILLION = 1e6


@dataclass(frozen=True)
class Rental:
    """What an hour of one chip costs, in dollars: `Rental("H800", 2.0, 3.42, "2025-01", "...")`."""

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
    """What a million tokens cost, in dollars: `Tariff("deepseek-r1", 0.14, 0.55, 2.19, "2025-03", "...")`."""

    model: str
    cached: float
    input: float
    output: float
    date: str
    source: str

    def revenue(self, cached: float, fresh: float, output: float) -> float:
        """Dollars for so many tokens: input that the cache held, input that it did not, output."""
        return (self.cached * cached + self.input * fresh + self.output * output) / MILLION

    def blend(self, outputs: float = 0.25) -> float:
        """Dollars for a million tokens of which `outputs` are written and the others read."""
        return (1 - outputs) * self.input + outputs * self.output


def rental(chip: str, price: float | None = None, until: str = "9999") -> Rental:
    """The latest price that the table has by that month; or the one that was given, which needs no table."""
    if price is not None:
        return Rental(chip, price, price, "", "given")
    family = chip.partition("-")[0].upper()
    found = [row for row in _table("rental") if str(row["chip"]) == family and str(row["date"]) <= until]
    if not found:
        raise LimbeckError(f"{chip}: no dated price of an hour in prices.yaml; say one with --price")
    row = max(found, key=lambda row: str(row["date"]))
    dollar = exchange(row["currency"])
    return Rental(chip, row["low"] / dollar, row["high"] / dollar, str(row["date"]), row["source"])


def tariff(model: str, currency: str = "USD", until: str = "9999") -> Tariff:
    """What a model's own host asked, in that currency's latest list by that month, in dollars."""
    found = [
        r
        for r in _table("tokens")
        if r["model"] == model and r["currency"] == currency and str(r["date"]) <= until
    ]
    if not found:
        known = ", ".join(sorted({row["model"] for row in _table("tokens")}))
        raise LimbeckError(
            f"{model}: no dated price of its tokens in {currency} in prices.yaml; there are {known}"
        )
    row = max(found, key=lambda row: str(row["date"]))
    dollar = exchange(currency)
    input_ = row["input"] / dollar
    return Tariff(
        model,
        row.get("cached", row["input"]) / dollar,
        input_,
        row["output"] / dollar,
        str(row["date"]),
        row["source"],
    )


def exchange(currency: str) -> float:
    """Money of that currency for one dollar."""
    if currency == "USD":
        return 1.0
    for row in _table("exchange"):
        if row["currency"] == currency:
            return row["rate"]
    raise LimbeckError(f"{currency}: no rate in prices.yaml")


def _table(part: str) -> list[dict[str, Any]]:
    return _tables()[part]


@cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    tables = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    for part, rows in tables.items():
        for row in rows:
            if not row.get("date") or not row.get("source"):
                raise LimbeckError(
                    f"{TABLE.name}: {part}: {row} has no date or no source; a price without them is no price"
                )
    return tables
