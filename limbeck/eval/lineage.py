"""The graph of a run, drawn in layers (Sugiyama, Tagawa and Toda 1981): what came from what, top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .words import Text

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 118, 42, 18, 30
_LANE = 14  # how wide a passing edge is


@dataclass(frozen=True)
class Box:
    """A stage in the drawing: `Box("zero", Text("RL · 76 s", "强化学习 · 76 秒"), ("base",), "model")`."""

    name: str
    caption: Text
    inputs: tuple[str, ...]
    family: str


def draw(boxes: Sequence[Box]) -> Markup:
    """The boxes and their edges as one SVG; an edge to a box that is not shown is left out."""
    shown = {box.name: box for box in boxes}
    edges = [(source, box.name) for box in boxes for source in box.inputs if source in shown]
    layers, chains = _layers(list(shown), edges)
    places, width = _places(layers, _neighbours(chains))
    height = len(layers) * (_HEIGHT + _GAP_Y) - _GAP_Y
    paths = [_edge([places[node] for node in chain]) for chain in chains]
    drawn = [_box(shown[name], *places[name]) for name in shown]
    opening = f'<svg class="lineage" viewBox="-1 -1 {width + 2:.0f} {height + 2}" style="max-width:{width + 2:.0f}px" role="img">'
    return Markup(opening + "".join(paths) + "".join(drawn) + "</svg>")


def _layers(names: list[str], edges: list[tuple[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Each name one layer below the lowest of its inputs; an edge over several layers gets a lane in each."""
    depth = dict.fromkeys(names, 0)
    for _ in names:  # as many rounds as the longest path could have
        for source, target in edges:
            depth[target] = max(depth[target], min(depth[source] + 1, len(names) - 1))
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for name in names:
        layers[depth[name]].append(name)
    chains = []
    for source, target in edges:
        lanes = [f"{source}\0{target}\0{level}" for level in range(depth[source] + 1, depth[target])]
        for level, lane in enumerate(lanes, depth[source] + 1):
            layers[level].append(lane)
        chains.append([source, *lanes, target])
    return layers, chains


def _neighbours(chains: list[list[str]]) -> dict[str, list[str]]:
    beside: dict[str, list[str]] = {}
    for chain in chains:
        for upper, lower in zip(chain, chain[1:], strict=False):
            beside.setdefault(upper, []).append(lower)
            beside.setdefault(lower, []).append(upper)
    return beside


def _places(layers: list[list[str]], beside: Mapping[str, list[str]]) -> tuple[dict[str, tuple[float, float]], float]:
    """Centre of every node: layers are ordered by the mean place of their neighbours, down and up a few times."""
    width = max(sum(_span(node) for node in layer) for layer in layers)
    centre: dict[str, float] = {}
    for layer in layers:
        _set_in_row(layer, centre, width, {})
    for sweep in range(12):
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wanted = {
                node: sum(centre[other] for other in beside[node]) / len(beside[node]) if node in beside else width / 2
                for node in layer
            }
            layer.sort(key=wanted.__getitem__)
            _set_in_row(layer, centre, width, wanted)
    return {
        node: (centre[node], level * (_HEIGHT + _GAP_Y)) for level, layer in enumerate(layers) for node in layer
    }, width


def _span(node: str) -> float:
    return _LANE if "\0" in node else _WIDTH + _GAP_X


def _set_in_row(layer: list[str], centre: dict[str, float], width: float, wanted: Mapping[str, float]) -> None:
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
    size = 13 if len(box.name) <= 15 else 13 * 15 / len(box.name)
    name = f'<text x="{x:.1f}" y="{y + 18:.1f}" style="font-size:{size:.1f}px">{escape(box.name)}</text>'
    captions = "".join(
        f'<text class="caption {language}" x="{x:.1f}" y="{y + 33:.1f}">{escape(caption)}</text>'
        for language, caption in (("en", box.caption.en), ("zh", box.caption.zh))
    )
    frame = f'<rect class="{box.family}" x="{x - _WIDTH / 2:.1f}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
    return f"<g>{frame}{name}{captions}</g>"
