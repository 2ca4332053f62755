"""The text of a recipe's plan on single cards: whether each stage fits, its memory, money, and cards side by
side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .plan_text import Answer, Conditions, duration

if TYPE_CHECKING:
    from ..pipeline.graph import Graph
    from ..plan.fit import Fit
    from ..plan.prices import Rental
    from .recipe_plan import Forecasts

GIB = 2**30  # bytes
LARGEST = 0.01  # share of the total below which a part of the memory is not printed
UNKNOWN = "-"  # in the place of money that no price is known for


def add_fits(answer: Answer, fits: dict[str, Fit]) -> None:
    """Add a line for each stage: whether it fits the card, its memory with the parts, and what would help."""
    if not fits:
        return
    answer.lines.append("")
    answer.lines.append("memory of the card at its peak, GiB, with completions at their longest:")
    width = max(map(len, fits))
    for name, fit in fits.items():
        answer.lines.append(f"  {name:{width}}  {_verdict(fit)}")
        if not fit.fits:
            answer.lines.append(f"  {'':{width}}  {_remedy(fit)}")
    answer.lines.append("")


def _verdict(fit: Fit) -> str:
    """Return a line such as `fits 12.94 of 22.4: activations 4.8, moments 4.4, ...; 64 rows at once`."""
    parts = sorted(fit.memory.parts().items(), key=lambda part: -part[1])
    whole = fit.memory.total
    named = [f"{name} {size / GIB:.2f}" for name, size in parts if size > LARGEST * whole]
    word = "fits" if fit.fits else "does not fit"
    rows = f"; {fit.rows} of {fit.wanted} rows at once" if fit.wanted else ""
    return f"{word:12} {whole / GIB:6.2f} of {fit.capacity / GIB:.1f}: {', '.join(named)}{rows}"


def _remedy(fit: Fit) -> str:
    """Return what makes a stage fit, or that nothing does."""
    if not fit.relieved:
        return "no setting makes it fit this card: take a larger card or a smaller model"
    return f"fits with {settings_text(fit.remedies)}: {fit.relieved.memory.total / GIB:.2f}"


def settings_text(changes: dict[str, Any]) -> str:
    """Return settings as a recipe has them: `recompute: keep_attention, optimizer.moments: int8`."""
    return ", ".join(f"{name}: {_value(value)}" for name, value in changes.items())


def _value(value: Any) -> str:
    """Return the value of a setting as YAML has it; adapters are those of the defaults."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str | int) else f"{{rank: {value.rank}}}"


def rental_of(conditions: Conditions) -> tuple[Rental | None, int]:
    """Return the price of an hour of a chip, or None if none is known, and the number of chips.

    On this machine, there is a price only if one was given.
    """
    from ..plan import cluster as clusters
    from ..plan import prices
    from ..types import LimbeckError

    price = conditions.price
    if not conditions.on:
        return (None if price is None else prices.rental("this machine", price)), 1
    cluster = clusters.cluster(conditions.on)
    try:
        return prices.rental(cluster.chip.name, price), cluster.count
    except LimbeckError:
        return None, cluster.count


# ---------------------------------------------------------------- cards side by side


def plan_cards(graph: Graph, on: list[str], conditions: Conditions) -> Answer:
    """Return one table of a recipe on several cards or clusters: time, money, and whether its stages fit."""
    from .recipe_plan import forecast_on

    answer = Answer()
    rows = [("on", "time", "dollars", "fits")]
    cards = []
    for name in on:
        forecasts = forecast_on(graph, name, conditions.changes)
        rental, count = rental_of(replace(conditions, on=name))
        cards.append(_card(graph, name, forecasts, rental, count))
        rows.append(_row(cards[-1], forecasts))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        answer.lines.append("  ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)).rstrip())
    answer.data["cards"] = cards
    return answer


def _card(graph: Graph, name: str, forecasts: Forecasts, rental: Rental | None, count: int) -> dict[str, Any]:
    """Return the figures of one card as a JSON object."""
    seconds, low, high = forecasts.total(graph)
    card = {
        "on": name,
        "seconds": round(seconds, 1),
        "low": round(low, 1),
        "high": round(high, 1),
        "money": money(rental, count, (seconds, low, high)),
        "fits": all(fit.fits for fit in forecasts.fits.values()),
        "stages": {stage: fit.told() for stage, fit in forecasts.fits.items()},
    }
    card["not_foreseen"] = sorted(forecasts.missing)
    return card


def _row(card: dict[str, Any], forecasts: Forecasts) -> tuple[str, str, str, str]:
    """Return the cells of one card: its name, time, money, and whether all stages fit."""
    spent = card["money"]
    cost = f"{spent['middle']:,.2f} ({spent['low']:,.2f} to {spent['high']:,.2f})" if spent else UNKNOWN
    time = f"{duration(card['seconds'])} ({duration(card['low'])} to {duration(card['high'])})"
    tight = [name for name, fit in forecasts.fits.items() if not fit.fits]
    fits = "all stages"
    if tight:
        hopeless = [name for name in tight if not forecasts.fits[name].relieved]
        eased = [name for name in tight if name not in hopeless]
        fits = f"with other settings: {', '.join(eased)}" if eased else ""
        fits += f"{'; ' if eased else ''}not: {', '.join(hopeless)}" if hopeless else ""
    if card["not_foreseen"]:
        time += f", without {', '.join(card['not_foreseen'])}"
    return card["on"], time, cost, fits


def money(rental: Rental | None, count: int, times: tuple[float, float, float]) -> dict[str, Any] | None:
    """Return the dollars of `count` chips for three times in seconds (middle, low, high); None without a
    price. The low end is the lowest price for the shortest time, the high end the highest for the longest."""
    if rental is None:
        return None
    middle, low, high = (count * seconds / 3600 for seconds in times)
    return {
        "middle": round(rental.middle * middle, 4),
        "low": round(rental.low * low, 4),
        "high": round(rental.high * high, 4),
        "an_hour": [rental.low, rental.high],
        "date": rental.date,
        "source": rental.source,
    }
