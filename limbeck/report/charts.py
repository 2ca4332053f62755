"""Pictures for the report: small SVGs that take their colours from the page, in daylight and in the dark.

No word of any language stands in a chart, only names of models and numbers: the page says the rest, twice.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from .series import cuts, means, running_mean

# matplotlib draws in colours that nobody would choose; on the page each becomes a CSS variable
TONES = ("one", "two", "three", "four", "ink", "muted", "rule")
HUES = TONES[:6]  # for lines; more than six in one chart share them
_HEX = {tone: f"#0a0a{i:02x}" for i, tone in enumerate(TONES, 1)}
POINTS = 240  # more than a chart of this size can show


@dataclass(frozen=True)
class Line:
    """One curve: `Line("zero", [0, 1, 2], [.22, .25, .31])`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str = "one"


@dataclass(frozen=True)
class Dots:
    """One row of a dot plot: `Dots("zero", [(.848, .825, .869, "one"), (.924, .906, .939, "two")])`."""

    label: str
    points: Sequence[tuple[float, float, float, str]]


def dots(rows: Sequence[Dots]) -> Markup:
    """Shares with their intervals, a row a model, every point labelled."""
    figure, axes = _figure(460, 34 * len(rows) + 30)
    for y, row in enumerate(rows):
        axes.axhline(y, color=_HEX["rule"], linewidth=0.6, zorder=0)
        spread = np.linspace(-0.17, 0.17, len(row.points)) if len(row.points) > 1 else [0.0]
        for offset, (mean, low, high, tone) in zip(spread, row.points, strict=True):
            at = y + offset
            axes.plot(
                [100 * low, 100 * high], [at, at], color=_HEX[tone], linewidth=2.2, solid_capstyle="round"
            )
            axes.plot([100 * mean], [at], "o", color=_HEX[tone], markersize=6)
            axes.text(100 * high + 1.6, at, f"{100 * mean:.0f}", color=_HEX[tone], va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 108)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])
    axes.grid(axis="x", color=_HEX["rule"], linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", labelsize=11, labelcolor=_HEX["ink"])
    return _svg(figure)


def curves(lines: Sequence[Line], percent: bool = False, log: bool = False) -> Markup:
    """Learning curves: the raw steps pale, their running mean strong, the name at its end."""
    figure, axes = _figure(330, 190)
    scale = 100 if percent else 1
    ends = []
    for line in lines:
        x, y = (means(np.asarray(values, float), cuts(len(line.x), POINTS)) for values in (line.x, line.y))
        y = scale * y
        if log:
            y = np.where(y > 0, y, np.nan)
        smooth = running_mean(y)
        axes.plot(x, y, color=_HEX[line.tone], linewidth=0.8, alpha=0.35)
        axes.plot(x, smooth, color=_HEX[line.tone], linewidth=1.8)
        ends.append((line, x[-1], smooth[-1]))
    _scale(axes, percent, log)
    axes.locator_params(axis="x", nbins=4, integer=True)
    _label_ends(axes, [end for end in ends if np.isfinite(end[2])], percent, alone=len(lines) == 1)
    axes.grid(axis="y", color=_HEX["rule"], linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_HEX["rule"])
    return _svg(figure)


def ladder(labels: Sequence[str], values: Sequence[float], tone: str = "one") -> Markup:
    """A share through a sequence of models."""
    figure, axes = _figure(max(300, 92 * len(labels)), 180)
    shares = [100 * value for value in values]
    axes.plot(range(len(shares)), shares, "-o", color=_HEX[tone], linewidth=1.6, markersize=6)
    reach = max(max(shares) - min(shares), 4)
    for x, share in enumerate(shares):
        axes.text(
            x, share + 0.09 * reach, f"{share:.1f}", ha="center", va="bottom", color=_HEX[tone], fontsize=10
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(min(shares) - 0.15 * reach, max(shares) + 0.3 * reach)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_HEX["rule"])
    axes.tick_params(axis="x", labelsize=11, labelcolor=_HEX["ink"])
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many CSS pixels, without pyplot and its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(length=0, labelsize=10, labelcolor=_HEX["muted"])
    return figure, axes


def _scale(axes: Any, percent: bool, log: bool) -> None:
    if log:
        axes.set_yscale("log")  # before the limits are read, which a logarithm keeps above zero
    low, high = axes.get_ylim()
    if log:
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
        axes.tick_params(which="minor", length=0)
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
        axes.set_ylim(10.0**bottom, 10.0 ** max(top, bottom + 1))
    elif percent:
        low = 0 if low < 50 else low
        axes.set_ylim(low, min(max(high, low + 5), 104))
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    else:
        axes.set_ylim(min(0, low), max(high, 1e-3))
        axes.locator_params(axis="y", nbins=4)


def _label_ends(axes: Any, ends: list[tuple[Line, float, float]], percent: bool, alone: bool) -> None:
    """Names where the curves end, pushed apart where they would touch."""
    transform = axes.transData + axes.transAxes.inverted()
    placed = sorted(((transform.transform((x, y))[1], line, y) for line, x, y in ends), key=lambda p: p[0])
    heights = _apart([at for at, _, _ in placed])
    for height, (_, line, value) in zip(heights, placed, strict=True):
        label = (f"{value:.0f}%" if percent else f"{value:.3g}") if alone else line.label
        axes.text(
            1.02, height, label, transform=axes.transAxes, va="center", color=_HEX[line.tone], fontsize=10
        )


def _apart(heights: list[float], distance: float = 0.095) -> list[float]:
    """A rising list with neighbours at least `distance` apart, below the top where there is room."""
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + distance)
    ceiling = max(1.0, distance * (len(heights) - 1))
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - distance
    return heights


def _svg(figure: Any) -> Markup:
    import matplotlib

    out = io.StringIO()
    # `hashsalt` makes ids, and so the page, the same on every run
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "limbeck"}):
        figure.savefig(
            out, format="svg", metadata={key: None for key in ("Date", "Creator", "Format", "Type")}
        )
    text = re.sub(
        r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->|\sxmlns(:xlink)?=\"[^\"]*\"",
        "",
        out.getvalue(),
        flags=re.DOTALL,
    )
    for tone, code in _HEX.items():
        text = text.replace(code, f"var(--{tone})")
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    width = re.search(r'width="([\d.]+)pt"', text).group(1)
    text = re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"',
        f'style="max-width:{1.35 * float(width):.0f}px" role="img"',
        text,
        count=1,
    )
    return Markup(re.sub(r">\s+<", "><", text))
