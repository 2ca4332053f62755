"""The graph of a run, drawn in layers from top to bottom (Sugiyama, Tagawa and Toda 1981)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .i18n import Text

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 168, 42, 20, 26
_LANE = 14  # how wide a passing edge is
_SWEEPS = 8  # more change nothing in graphs of this size


@dataclass(frozen=True)
class Box:
    """A stage in the drawing: `Box("zero", Text("RL · 76 s", "强化学习 · 76 秒"), ("base",), "model")`.

    Of a run that is going on, `state` says how the stage stands and `share` how much of it is done; `link` leads to it.
    """

    name: str
    caption: Text
    inputs: tuple[str, ...]
    family: str
    link: str = ""
    state: str = ""
    share: float = 0.0


def draw(boxes: Sequence[Box], label: str = "") -> Markup:
    """The boxes and their edges as one SVG; an edge to a box that is not shown is left out. `label` names a drawing that
    can be followed by its links; without links it is a picture."""
    shown = {box.name: box for box in boxes}
    edges = [(source, box.name) for box in boxes for source in box.inputs if source in shown]
    layers, chains = _layers(list(shown), edges)
    places, width = _places(layers, chains)
    height = len(layers) * (_HEIGHT + _GAP_Y) - _GAP_Y
    paths = [_edge([places[node] for node in chain]) for chain in chains]
    drawn = [_box(shown[name], *places[name]) for name in shown]
    view = f'viewBox="-1 -1 {width + 2:.0f} {height + 2}" width="{width + 2:.0f}"'
    role = f'role="group" aria-label="{escape(label)}"' if label else 'role="img"'
    return Markup(f'<svg class="lineage" {role} {view}>' + "".join(paths) + "".join(drawn) + "</svg>")


def _layers(names: list[str], edges: list[tuple[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Each name just above the first that needs it; an edge over several layers gets a lane in each.

    Late rather than early: what only the end needs, such as a student's base, starts no lane at the top.
    """
    height = dict.fromkeys(names, 0)
    for _ in names:  # as many rounds as the longest path could have
        for source, target in edges:
            height[source] = max(height[source], min(height[target] + 1, len(names) - 1))
    tallest = max(height.values())
    depth = {name: tallest - height[name] for name in names}
    layers: list[list[str]] = [[] for _ in range(tallest + 1)]
    for name in names:
        layers[depth[name]].append(name)
    chains = []
    for source, target in edges:
        lanes = [f"{source}\0{target}\0{level}" for level in range(depth[source] + 1, depth[target])]
        for level, lane in enumerate(lanes, depth[source] + 1):
            layers[level].append(lane)
        chains.append([source, *lanes, target])
    return layers, chains


def _places(layers: list[list[str]], chains: list[list[str]]) -> tuple[dict[str, tuple[float, float]], float]:
    """Centre of every node: the order in each layer from its neighbours, down and up; then the columns."""
    above: dict[str, list[str]] = {}
    beside: dict[str, list[str]] = {}
    for upper, lower in (pair for chain in chains for pair in itertools.pairwise(chain)):
        above.setdefault(lower, []).append(upper)
        beside.setdefault(upper, []).append(lower)
        beside.setdefault(lower, []).append(upper)
    width = max(sum(map(_span, layer)) for layer in layers)
    centre: dict[str, float] = {}
    for layer in layers:
        _set_in_row(layer, centre, width, {})
    for layer in [*layers, *layers[::-1]] * _SWEEPS:
        wanted = {node: _mean(beside.get(node, []), centre, width / 2) for node in layer}
        layer.sort(key=wanted.__getitem__)
        _set_in_row(layer, centre, width, wanted)
    for layer in layers:  # what nothing comes before stands as far left as it can
        wanted = {node: _under(node, above[node], centre) for node in layer if node in above}
        _set_in_row(layer, centre, width, wanted)
    places = {
        node: (centre[node], i * (_HEIGHT + _GAP_Y)) for i, layer in enumerate(layers) for node in layer
    }
    return places, width


def _mean(nodes: Sequence[str], centre: Mapping[str, float], otherwise: float) -> float:
    return sum(centre[node] for node in nodes) / len(nodes) if nodes else otherwise


def _under(node: str, above: Sequence[str], centre: Mapping[str, float]) -> float:
    """Straight below what comes before it: a box below a box, a lane below its lane."""
    like = [other for other in above if _is_lane(other) == _is_lane(node)]
    return _mean(like[:1] or above, centre, 0.0)


def _is_lane(node: str) -> bool:
    return "\0" in node


def _span(node: str) -> float:
    return _LANE if _is_lane(node) else _WIDTH + _GAP_X


def _set_in_row(
    layer: list[str], centre: dict[str, float], width: float, wanted: Mapping[str, float]
) -> None:
    """As near to where each wants to be as the order and the page allow."""
    edge = 0.0
    room = width - sum(_span(node) for node in layer)
    for node in layer:
        half = _span(node) / 2
        at = wanted.get(node, edge + half)
        # `room` is what those to the right can spare
        at = min(max(at, edge + half), edge + half + room)
        room -= at - half - edge
        centre[node] = at
        edge = at + half


def _edge(points: list[tuple[float, float]]) -> str:
    """From under the first box, down through the lanes, to the top of the last."""
    (x, y), rest = points[0], points[1:]
    y += _HEIGHT
    path = f"M{x:.1f},{y:.1f}"
    for i, (to_x, to_y) in enumerate(rest):
        middle = (y + to_y) / 2
        path += f"C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f}"
        x, y = to_x, to_y
        if i < len(rest) - 1:
            y += _HEIGHT
            path += f"V{y:.1f}"
    return f'<path d="{path}"/>'


def _box(box: Box, x: float, y: float) -> str:
    # attributes and no styles: a page of the studio refuses styles that stand in its text
    size = 13 if len(box.name) <= 15 else 13 * 15 / len(box.name)
    name = (
        f'<text class="name" font-size="{size:.1f}px" x="{x:.1f}" y="{y + 18:.1f}">{escape(box.name)}</text>'
    )
    captions = "".join(
        f'<text class="caption {language}" x="{x:.1f}" y="{y + 33:.1f}">{escape(caption)}</text>'
        for language, caption in (("en", box.caption.en), ("zh", box.caption.zh))
    )
    left = x - _WIDTH / 2
    place = f'x="{left:.1f}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"'
    bar = (
        f'<rect class="share" x="{left:.1f}" y="{y + _HEIGHT - 4}" width="{_WIDTH * min(1.0, box.share):.1f}" height="4" rx="2"/>'
        if box.share
        else ""
    )
    drawn = f'<g class="{box.state}"><rect class="{box.family}" {place}/>{bar}{name}{captions}</g>'
    return f'<a href="{escape(box.link)}" id="box-{escape(box.name)}">{drawn}</a>' if box.link else drawn
