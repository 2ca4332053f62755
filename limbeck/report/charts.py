"""Charts of the report: small SVGs whose colours are the page's CSS variables, for its light and dark
themes.

A chart holds names of models and numbers, no words: the page describes it in both languages. A tone is the
name of a colour, one of `TONES`.

Shapes: P points of a curve.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from .series import cuts, means, running_mean

# matplotlib draws each tone in a placeholder colour, which becomes a CSS variable on the page
TONES = ("one", "two", "three", "four", "ink", "muted", "rule")
HUES = TONES[:6]  # tones of lines; a chart of more than six lines repeats them
_HEX = {tone: f"#0a0a{i:02x}" for i, tone in enumerate(TONES, 1)}
_MAX_POINTS = 240  # points of a curve; a chart of this size can show no more
_SVG_METADATA = ("Date", "Creator", "Format", "Type")
_SVG_NOISE = re.compile(
    r"^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->|\sxmlns(:xlink)?=\"[^\"]*\"", re.DOTALL
)


@dataclass(frozen=True)
class Line:
    """One curve of a chart: `Line("zero", [0, 1, 2], [.22, .25, .31])` has the label zero, the x values
    and the y values.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str = "one"


@dataclass(frozen=True)
class Dots:
    """One row of a dot plot: `Dots("zero", [(.848, .825, .869, "one"), (.924, .906, .939, "two")])`.

    Each point is (mean, lower end of the interval, upper end of the interval, tone); the numbers are shares
    from 0 to 1.
    """

    label: str
    points: Sequence[tuple[float, float, float, str]]


class Gap(NamedTuple):
    """One row of a chart of differences: `Gap("clock greedy", .12, .08, .16)`, in shares from -1 to 1."""

    label: str
    mean: float
    low: float
    high: float


class _End(NamedTuple):
    """The last point (`x`, `y`) of a drawn curve, beside which the curve's label is placed."""

    line: Line
    x: float
    y: float


# ---------------------------------------------------------------- kinds of charts


def dots(rows: Sequence[Dots]) -> Markup:
    """Return a dot plot of shares with their intervals: one row for each model, every point labelled with
    its percentage.
    """
    figure, axes = _figure(460, 34 * len(rows) + 30)
    for y, row in enumerate(rows):
        axes.axhline(y, color=_HEX["rule"], linewidth=0.6, zorder=0)
        offsets = np.linspace(-0.17, 0.17, len(row.points)) if len(row.points) > 1 else [0.0]
        for offset, point in zip(offsets, row.points, strict=True):
            _dot(axes, y + offset, *point)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 108)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100%"])
    axes.grid(axis="x", color=_HEX["rule"], linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", labelsize=11, labelcolor=_HEX["ink"])
    return _svg(figure)


def gaps(rows: Sequence[Gap]) -> Markup:
    """Return a chart of differences with their intervals in points, one row each, around a line at zero."""
    figure, axes = _figure(460, 30 * len(rows) + 30)
    axes.axvline(0, color=_HEX["muted"], linewidth=0.8, zorder=0)
    for y, row in enumerate(rows):
        _gap(axes, y, row)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.margins(x=0.12)
    axes.grid(axis="x", color=_HEX["rule"], linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", labelsize=11, labelcolor=_HEX["ink"])
    return _svg(figure)


def _gap(axes: Any, at: float, row: Gap) -> None:
    """Draw one difference with its interval at the y coordinate `at`; pale if the interval has zero in it."""
    color = _HEX["muted" if row.low <= 0 <= row.high else "one"]
    axes.plot([100 * row.low, 100 * row.high], [at, at], color=color, linewidth=2.2, solid_capstyle="round")
    axes.plot([100 * row.mean], [at], "o", color=color, markersize=6)
    beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 10}
    axes.annotate(f"{100 * row.mean:+.0f}", (100 * row.high, at), color=color, **beside)


def _dot(axes: Any, at: float, mean: float, low: float, high: float, tone: str) -> None:
    """Draw one share (`mean`) with its interval from `low` to `high`.

    The shares are from 0 to 1 and are drawn in percent; `at` is the y coordinate.
    """
    color = _HEX[tone]
    axes.plot([100 * low, 100 * high], [at, at], color=color, linewidth=2.2, solid_capstyle="round")
    axes.plot([100 * mean], [at], "o", color=color, markersize=6)
    axes.text(100 * high + 1.6, at, f"{100 * mean:.0f}", color=color, va="center", fontsize=10)


def curves(lines: Sequence[Line], percent: bool = False, log: bool = False) -> Markup:
    """Return a chart of learning curves: the values pale, their running mean strong, and a label at the
    end of each curve.

    With `percent` the values are shares from 0 to 1, drawn in percent; with `log` the y axis is logarithmic.
    """
    figure, axes = _figure(330, 190)
    ends = []
    for line in lines:
        end = _curve(axes, line, percent, log)
        if np.isfinite(end.y):
            ends.append(end)
    _scale(axes, percent, log)
    axes.locator_params(axis="x", nbins=4, integer=True)
    _label_ends(axes, ends, percent, alone=len(lines) == 1)
    axes.grid(axis="y", color=_HEX["rule"], linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_HEX["rule"])
    return _svg(figure)


def _curve(axes: Any, line: Line, percent: bool, log: bool) -> _End:
    """Draw one curve with its running mean, and return the last point of the running mean.

    `percent` and `log` are those of `curves`.
    """
    at = cuts(len(line.x), _MAX_POINTS)
    x_P = means(np.asarray(line.x, float), at)
    y_P = means(np.asarray(line.y, float), at)
    if percent:
        y_P = 100 * y_P
    if log:
        y_P = np.where(y_P > 0, y_P, np.nan)
    smooth_P = running_mean(y_P)
    axes.plot(x_P, y_P, color=_HEX[line.tone], linewidth=0.8, alpha=0.35)
    axes.plot(x_P, smooth_P, color=_HEX[line.tone], linewidth=1.8)
    return _End(line, x_P[-1], smooth_P[-1])


def ladder(labels: Sequence[str], values: Sequence[float], tone: str = "one") -> Markup:
    """Return a chart of one share (0 to 1) for each of several models, from left to right, joined by a
    line.

    `labels` are the models' names and `values` their shares.
    """
    figure, axes = _figure(max(300, 92 * len(labels)), 180)
    shares = [100 * value for value in values]
    lowest = min(shares)
    highest = max(shares)
    reach = max(highest - lowest, 4)
    axes.plot(range(len(shares)), shares, "-o", color=_HEX[tone], linewidth=1.6, markersize=6)
    style = {"ha": "center", "va": "bottom", "color": _HEX[tone], "fontsize": 10}
    for x, share in enumerate(shares):
        axes.text(x, share + 0.09 * reach, f"{share:.1f}", **style)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(lowest - 0.15 * reach, highest + 0.3 * reach)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_HEX["rule"])
    axes.tick_params(axis="x", labelsize=11, labelcolor=_HEX["ink"])
    return _svg(figure)


# ---------------------------------------------------------------- axes


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a new matplotlib figure of `width` x `height` CSS pixels, and its axes.

    It is made without pyplot, which keeps global state.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(length=0, labelsize=10, labelcolor=_HEX["muted"])
    return figure, axes


def _scale(axes: Any, percent: bool, log: bool) -> None:
    """Set the y axis: logarithmic with `log`, in percent with `percent`, otherwise linear with 0 included."""
    if log:
        _scale_log(axes)
    elif percent:
        _scale_percent(axes)
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low), max(high, 1e-3))
        axes.locator_params(axis="y", nbins=4)


def _scale_log(axes: Any) -> None:
    """Make the y axis logarithmic, from one power of ten to another."""
    axes.set_yscale("log")  # before the limits are read: a logarithmic axis keeps them above zero
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(lambda *_: "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))
    axes.tick_params(which="minor", length=0)
    bottom = math.floor(math.log10(low))
    top = max(math.ceil(math.log10(high)), bottom + 1)
    axes.set_ylim(10.0**bottom, 10.0**top)


def _scale_percent(axes: Any) -> None:
    """Label the y axis in percent, and begin it at 0 if its lower end is below 50 %."""
    low, high = axes.get_ylim()
    if low < 50:
        low = 0
    axes.set_ylim(low, min(max(high, low + 5), 104))
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")


def _label_ends(axes: Any, ends: list[_End], percent: bool, alone: bool) -> None:
    """Write a label at the end of each curve, with labels that would overlap moved apart.

    The label is the curve's name. If the chart has a single curve (`alone`) it is the curve's last value, in
    percent with `percent`.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = [(to_axes.transform((end.x, end.y))[1], end) for end in ends]
    placed.sort(key=lambda pair: pair[0])
    heights = _apart([height for height, _ in placed])
    style = {"transform": axes.transAxes, "va": "center", "fontsize": 10}
    for height, (_, end) in zip(heights, placed, strict=True):
        label = end.line.label
        if alone:
            label = f"{end.y:.0f}%" if percent else f"{end.y:.3g}"
        axes.text(1.02, height, label, color=_HEX[end.line.tone], **style)


def _apart(heights: list[float], distance: float = 0.095) -> list[float]:
    """Move labels apart: change the ascending `heights` so that neighbours are at least `distance` apart,
    and return them.

    The unit is the height of the axes; no height is above 1 unless there are too many labels.
    """
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + distance)
    ceiling = max(1.0, distance * (len(heights) - 1))
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - distance
    return heights


# ---------------------------------------------------------------- SVG


def _svg(figure: Any) -> Markup:
    """Return the figure as an SVG element.

    Its colours are the page's CSS variables, and its width shrinks with the page.
    """
    text = _SVG_NOISE.sub("", _savefig(figure))
    for tone, code in _HEX.items():
        text = text.replace(code, f"var(--{tone})")
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    width = float(re.search(r'width="([\d.]+)pt"', text).group(1))
    size = f'style="max-width:{1.35 * width:.0f}px" role="img"'
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', size, text, count=1)
    return Markup(re.sub(r">\s+<", "><", text))


def as_attributes(chart: Markup, label: str) -> Markup:
    """Return a chart whose styles are presentation attributes instead, for a page whose content policy
    forbids inline styles. The page's own style sheet gives the chart its width and its font.

    `label` describes the chart to screen readers.
    """
    described = chart.replace('role="img"', Markup('role="img" aria-label="{}"').format(label), 1)
    text = re.sub(r"<style.*?</style>", "", described, flags=re.DOTALL)
    return Markup(re.sub(r'style="([^"]*)"', _attributes, text))


def _attributes(match: re.Match[str]) -> str:
    """Return the declarations of a style as attributes, without its font and its width."""
    declarations = [part.partition(":") for part in match[1].split(";")]
    pairs = [(name.strip(), value.strip()) for name, _, value in declarations]
    return " ".join(f'{name}="{value}"' for name, value in pairs if name not in ("font-family", "max-width"))


def _savefig(figure: Any) -> str:
    """Return the SVG text that matplotlib writes for the figure; the same figure always gives the same
    text.
    """
    import matplotlib

    file = io.StringIO()
    # a fixed `hashsalt` makes the ids, and so the page, the same on every run
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "limbeck"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(_SVG_METADATA))
    return file.getvalue()
