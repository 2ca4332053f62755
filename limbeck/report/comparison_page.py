"""The page that `limbeck compare --page` writes: differences with intervals, curves over each other, and
problems that flipped. In English and Chinese.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from markupsafe import Markup

from . import charts, i18n
from .loaded_run import StageView
from .page import page_environment
from .paired import PairedResult

CSS = Path(__file__).parent / "report.css"
METRICS = ("accuracy", "reward", "length", "entropy", "loss")  # that are drawn where both stages log them
SHARES = ("accuracy",)
SHOWN = 6  # flipped problems of each kind


class Side(Protocol):
    """One side of a comparison: its name and its costs by name."""

    title: str
    costs: Mapping[str, float]


class Comparison(Protocol):
    """What the page shows; `pipeline/comparison.py` makes it."""

    a: Side
    b: Side
    results: Mapping[str, Sequence[PairedResult]]
    settings: Mapping[str, Mapping[str, str]]

    def stages(self) -> Mapping[str, tuple[StageView, StageView]]:
        """Return the pairs of stages whose curves are drawn over each other, by a title."""


def render(comparison: Comparison) -> str:
    """Return the page as HTML; every text of a model or a recipe is escaped."""
    template = page_environment().get_template("comparison.html.jinja")
    return template.render(
        a=comparison.a,
        b=comparison.b,
        models=[_model(name, results) for name, results in comparison.results.items()],
        curves=_curves(comparison),
        settings=_settings(comparison),
        css=Markup(CSS.read_text(encoding="utf-8")),
    )


def _model(name: str, results: Sequence[PairedResult]) -> dict[str, Any]:
    """Return the template's variables of one model: its chart, its table and its flips."""
    rows = [charts.Gap(f"{r.source} {r.mode}", r.difference, r.low, r.high) for r in results]
    flips = results[0].flips
    return {
        "name": name,
        "chart": charts.gaps(rows),
        "results": results,
        "flips": [(flips.won[:SHOWN], len(flips.won)), (flips.lost[:SHOWN], len(flips.lost))],
    }


def _curves(comparison: Comparison) -> list[tuple[str, Markup]]:
    """Return charts of the metrics that a pair of stages both logged, each with its title."""
    drawn = []
    for title, pair in comparison.stages().items():
        for metric in METRICS:
            lines = []
            for side, tone, stage in zip((comparison.a, comparison.b), charts.HUES, pair, strict=False):
                steps, values = stage.column(metric)
                if values:
                    lines.append(charts.Line(side.title, steps, values, tone))
            if len(lines) == 2:
                drawn.append((f"{title} · {metric}", charts.curves(lines, percent=metric in SHARES)))
    return drawn


def _settings(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Return the differing settings, each with the values of A and B."""
    before, after = (comparison.settings.get(side.title, {}) for side in (comparison.a, comparison.b))
    keys = dict.fromkeys([*before, *after])
    return [(key, before.get(key, i18n.UNKNOWN), after.get(key, i18n.UNKNOWN)) for key in keys]
