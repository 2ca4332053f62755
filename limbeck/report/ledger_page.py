"""The page "better, faster, cheaper" that `limbeck iterate` writes: accuracy, tokens, seconds and money of
each generation, and why it was promoted or not. In English and Chinese.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from markupsafe import Markup

from ..eval.gate import Check, Decision
from ..eval.statistics import Interval
from . import charts, i18n
from .comparison_page import CSS
from .i18n import Text, W
from .page import page_environment

SMALLEST_P = 1e-4  # of a test; smaller ones are told as smaller
HOUR = 3600  # seconds


class Model(Protocol):
    """A measured model: what the page shows of it."""

    stage: str
    accuracy: Interval
    tokens: float
    seconds_per_right: float | None
    flops_per_right: float | None


class Generation(Protocol):
    """One generation; `pipeline/generations/ledger.py` makes it."""

    generation: int
    run: str
    candidate: Model
    champion: Model
    decision: Decision
    promoted: bool
    first: bool
    training: dict[str, float]


class Generations(Protocol):
    """What the page shows: all generations of a recipe."""

    name: str
    entries: Sequence[Generation]
    best: Generation
    gates: int

    def rate(self) -> float:
        """Return the probability, at most, that any decision promoted falsely."""


def render(ledger: Generations, price: float | None) -> str:
    """Return the page as HTML; every text of a recipe is escaped. `price` is in dollars an hour of the
    machine, None if it is not known."""
    best = ledger.best
    told = {"model": best.candidate.stage, "generation": best.generation, "run": best.run}
    return (
        page_environment()
        .get_template("ledger.html.jinja")
        .render(
            ledger=ledger,
            best=W["generations_best"].format(**told),
            rate=rate_sentence(ledger),
            chart=charts.dots(list(map(_dots, ledger.entries))),
            rows=[_row(entry, price) for entry in ledger.entries],
            price=price_sentence(price),
            css=Markup(CSS.read_text(encoding="utf-8")),
        )
    )


def _dots(entry: Generation) -> charts.Dots:
    """Return the row of a generation in the chart: its candidate and the champion before it."""
    points = [
        (model.accuracy.mean, model.accuracy.low, model.accuracy.high, tone)
        for model, tone in ((entry.candidate, "one"), (entry.champion, "muted"))
    ]
    return charts.Dots(entry.candidate.stage, points)


def _row(entry: Generation, price: float | None) -> dict[str, Any]:
    """Return the template's variables of a generation."""
    return {
        "entry": entry,
        "outcome": outcome(entry),
        "reasons": [check_sentence(check) for check in entry.decision.checks],
        "sides": [_side(model, price) for model in (entry.candidate, entry.champion)],
        "dollars": _dollars(entry.training["seconds"], price),
    }


def _side(model: Model, price: float | None) -> dict[str, str]:
    """Return the numbers of a model as text, by column."""
    return {
        "accuracy": i18n.percent(model.accuracy.mean),
        "tokens": i18n.number(model.tokens),
        "seconds": significant(model.seconds_per_right),
        "flops": i18n.scientific(model.flops_per_right),
        "dollars": _dollars(model.seconds_per_right, price),
    }


def _dollars(seconds: float | None, price: float | None) -> str:
    """Return the dollars of seconds as text, at a price an hour."""
    return significant(None if seconds is None or price is None else seconds / HOUR * price)


def significant(value: float | None) -> str:
    """Return a number with three significant digits: `0.0123`."""
    return i18n.UNKNOWN if value is None else f"{value:.3g}"


# ---------------------------------------------------------------- sentences


def outcome(entry: Generation) -> Text:
    """Return in a word what was decided on a generation."""
    if entry.first:
        return W["first_generation"]
    return W["promoted" if entry.promoted else "refused"]


def rate_sentence(ledger: Generations) -> Text:
    """Return the sentence about the rate of false promotions."""
    alpha = ledger.entries[-1].decision.alpha
    rates = {"alpha": i18n.percent(alpha, 0), "rate": i18n.percent(ledger.rate(), 0)}
    return W["generations_rate"].format(gates=ledger.gates, **rates)


def price_sentence(price: float | None) -> Text:
    """Return the sentence about what is assumed about money."""
    if price is None:
        return W["generations_unpriced"]
    return W["generations_price"].format(f"{price:g}")


def check_sentence(check: Check) -> Text:
    """Return the sentence about one check of the gate."""
    words = ("check_kept", "check_lost") if check.margin else ("check_better", "check_no_better")
    return W[words[not check.passed]].format(
        name=W[f"check_{check.name}"],
        points=f"{100 * check.difference:+.1f}",
        n=check.n,
        margin=f"{100 * check.margin:g}",
        p=f"p = {check.p:.2g}" if check.p >= SMALLEST_P else f"p < {SMALLEST_P:g}",
    )
