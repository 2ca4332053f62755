"""The graph of a run, drawn in layers from top to bottom (Sugiyama, Tagawa and Toda 1981)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .i18n import Text

_WIDTH = 168  # pixels, of a box
_HEIGHT = 42  # pixels, of a box
_GAP_X = 20  # pixels between boxes of a layer
_GAP_Y = 26  # pixels between layers
_LANE = 14  # pixels, width of an edge that passes a layer
_SWEEPS = 8  # passes down and up; more change nothing in graphs of this size

Point = tuple[float, float]  # x and y, in pixels


@dataclass(frozen=True)
class Box:
    """A stage in the drawing: `Box("zero", Text("RL · 76 s", "强化学习 · 76 秒"), ("base",), "model")`.

    In a run in progress, `state` is the stage's state and `share` the share of it that is done; `link` leads
    to its page.
    """

    name: str
    caption: Text
    inputs: tuple[str, ...]
    family: str
    link: str = ""
    state: str = ""
    share: float = 0.0


def draw(boxes: Sequence[Box], label: str = "") -> Markup:
    """The boxes and their edges as one SVG; an edge from a box that is not drawn is left out.

    With a `label` the drawing is a group of links, without one a picture.
    """
    drawn = {box.name: box for box in boxes}
    edges = [(source, box.name) for box in boxes for source in box.inputs if source in drawn]
    layers, chains = _layers(list(drawn), edges)
    places, width = _places(layers, chains)
    height = len(layers) * (_HEIGHT + _GAP_Y) - _GAP_Y
    parts = []
    for chain in chains:
        parts.append(_edge([places[node] for node in chain]))
    for name, box in drawn.items():
        parts.append(_box(box, *places[name]))
    view = f'viewBox="-1 -1 {width + 2:.0f} {height + 2}" width="{width + 2:.0f}"'
    role = f'role="group" aria-label="{escape(label)}"' if label else 'role="img"'
    return Markup(f'<svg class="lineage" {role} {view}>' + "".join(parts) + "</svg>")


# ---------------------------------------------------------------- layout


def _layers(names: list[str], edges: list[tuple[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """The nodes of each layer, and the chain of nodes of each edge.

    A box is in the layer just above its first reader; an edge over several layers has a lane in each. So a
    box that only the end needs, such as a student's base, starts no lane at the top.
    """
    depth = _depths(names, edges)
    layers: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for name in names:
        layers[depth[name]].append(name)
    chains = []
    for source, target in edges:
        chain = [source]
        for level in range(depth[source] + 1, depth[target]):
            lane = f"{source}\0{target}\0{level}"
            layers[level].append(lane)
            chain.append(lane)
        chains.append([*chain, target])
    return layers, chains


def _depths(names: list[str], edges: list[tuple[str, str]]) -> dict[str, int]:
    """The layer of each box, 0 at the top: as low as its readers allow."""
    height = dict.fromkeys(names, 0)
    highest = len(names) - 1
    for _ in names:  # as many rounds as the longest path could have
        for source, target in edges:
            above = min(height[target] + 1, highest)
            height[source] = max(height[source], above)
    tallest = max(height.values())
    return {name: tallest - height[name] for name in names}


def _places(layers: list[list[str]], chains: list[list[str]]) -> tuple[dict[str, Point], float]:
    """Centre of each node's top edge, and the drawing's width.

    Sweeps down and up order each layer by its neighbours; then each layer moves below its inputs.
    """
    above, beside = _neighbours(chains)
    width = max(sum(map(_span, layer)) for layer in layers)
    centre: dict[str, float] = {}
    for layer in layers:
        _set_in_row(layer, centre, width, {})
    for layer in [*layers, *layers[::-1]] * _SWEEPS:
        wanted = {node: _mean(beside.get(node, []), centre, width / 2) for node in layer}
        layer.sort(key=wanted.__getitem__)
        _set_in_row(layer, centre, width, wanted)
    for layer in layers:  # a node without inputs moves as far left as it can
        wanted = {node: _under(node, above[node], centre) for node in layer if node in above}
        _set_in_row(layer, centre, width, wanted)
    places = {}
    for level, layer in enumerate(layers):
        for node in layer:
            places[node] = (centre[node], level * (_HEIGHT + _GAP_Y))
    return places, width


def _neighbours(chains: list[list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Node -> nodes above it; and node -> nodes above and below it."""
    above: dict[str, list[str]] = {}
    beside: dict[str, list[str]] = {}
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            above.setdefault(lower, []).append(upper)
            beside.setdefault(upper, []).append(lower)
            beside.setdefault(lower, []).append(upper)
    return above, beside


def _mean(nodes: Sequence[str], centre: Mapping[str, float], default: float) -> float:
    """Mean centre of `nodes`, or `default` without any."""
    if not nodes:
        return default
    return sum(centre[node] for node in nodes) / len(nodes)


def _under(node: str, above: Sequence[str], centre: Mapping[str, float]) -> float:
    """Straight below the node's input: a box below a box, a lane below its lane."""
    same_kind = [other for other in above if _is_lane(other) == _is_lane(node)]
    return _mean(same_kind[:1] or above, centre, 0.0)


def _is_lane(node: str) -> bool:
    """True for a lane, False for a box."""
    return "\0" in node


def _span(node: str) -> float:
    """Pixels that a node takes in its layer."""
    return _LANE if _is_lane(node) else _WIDTH + _GAP_X


def _set_in_row(
    layer: list[str], centre: dict[str, float], width: float, wanted: Mapping[str, float]
) -> None:
    """Set the centres of a layer as near to `wanted` as the order and the width allow."""
    edge = 0.0
    room = width - sum(_span(node) for node in layer)
    for node in layer:
        half = _span(node) / 2
        leftmost = edge + half
        # `room` is the space that the nodes to the right can spare
        at = min(max(wanted.get(node, leftmost), leftmost), leftmost + room)
        room -= at - half - edge
        centre[node] = at
        edge = at + half


# ---------------------------------------------------------------- SVG


def _edge(points: list[Point]) -> str:
    """A path from below the first box, down through the lanes, to the top of the last box."""
    x, y = points[0]
    y += _HEIGHT
    path = f"M{x:.1f},{y:.1f}"
    for i, (to_x, to_y) in enumerate(points[1:], 1):
        middle = (y + to_y) / 2
        path += f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f}"
        x = to_x
        y = to_y
        if i < len(points) - 1:
            y += _HEIGHT
            path += f"V{y:.1f}"
    return f'<path d="{path}"/>'


def _box(box: Box, x: float, y: float) -> str:
    """One box with its name, its caption in both languages, its progress bar and its link.

    It has attributes and no `style`: the studio's content security policy refuses inline styles.
    """
    left = x - _WIDTH / 2
    rectangle = (
        f'<rect class="{box.family}" x="{left:.1f}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
    )
    content = rectangle + _bar(box.share, left, y) + _name(box.name, x, y) + _captions(box.caption, x, y)
    group = f'<g class="{box.state}">{content}</g>'
    if not box.link:
        return group
    return f'<a href="{escape(box.link)}" id="box-{escape(box.name)}">{group}</a>'


def _bar(share: float, left: float, y: float) -> str:
    """The progress bar at the bottom of a box; empty at a share of 0."""
    if not share:
        return ""
    width = _WIDTH * min(1.0, share)
    place = f'x="{left:.1f}" y="{y + _HEIGHT - 4}" width="{width:.1f}" height="4"'
    return f'<rect class="share" {place} rx="2"/>'


def _name(name: str, x: float, y: float) -> str:
    """The name of a box, in a smaller size if it is long."""
    size = 13 if len(name) <= 15 else 13 * 15 / len(name)
    place = f'x="{x:.1f}" y="{y + 18:.1f}"'
    return f'<text class="name" font-size="{size:.1f}px" {place}>{escape(name)}</text>'


def _captions(caption: Text, x: float, y: float) -> str:
    """The caption of a box, once in each language."""
    place = f'x="{x:.1f}" y="{y + 33:.1f}"'
    texts = ""
    for language in ("en", "zh"):
        text = escape(getattr(caption, language))
        texts += f'<text class="caption {language}" {place}>{text}</text>'
    return texts
