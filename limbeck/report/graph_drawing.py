"""The graph of a run, drawn in layers from top to bottom (Sugiyama, Tagawa and Toda 1981).

A box is a stage. An edge leads from a stage to a stage that reads its output. Where an edge passes a layer
without ending there, it has a lane: an invisible node, narrower than a box, that keeps room for the edge. A
node is a box or a lane; a chain is the list of the nodes of one edge, from its first box to its last.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .i18n import Text

_WIDTH = 168  # pixels, of a box
_HEIGHT = 42  # pixels, of a box
_GAP_X = 20  # pixels between boxes of a layer
_GAP_Y = 32  # pixels between layers
_LANE = 14  # pixels, width of an edge that passes a layer
_SWEEPS = 8  # passes down and up; more change nothing in graphs of this size

Point = tuple[float, float]  # x and y, in pixels


@dataclass(frozen=True)
class Box:
    """A stage in the drawing: `Box("zero", Text("RL · 76 s", "强化学习 · 76 秒"), ("base",), "model")`.

    `inputs` are the names of the stages that it reads, and `family` is its CSS class. In a run in progress,
    `state` is the stage's state and `share` the part of it that is done, from 0 to 1; `link` is the address
    of its page.
    """

    name: str
    caption: Text
    inputs: tuple[str, ...]
    family: str
    link: str = ""
    state: str = ""
    share: float = 0.0


def draw(boxes: Sequence[Box], label: str = "") -> Markup:
    """Return the boxes and their edges as one SVG. An edge from a stage that has no box is left out.

    With a `label` the SVG is marked for screen readers as a group of links with that name, without one as an
    image.
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
    """Return the nodes of each layer from top to bottom, and the chain of nodes of each edge.

    A box is placed in the layer just above the first box that reads it, so a stage that only the end needs,
    such as a student's base model, does not send a long edge down from the top.
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
    """Return the layer of each box, 0 at the top. Each box is as low as the boxes that read it allow."""
    height = dict.fromkeys(names, 0)
    highest = len(names) - 1
    for _ in names:  # as many rounds as the longest path could have
        for source, target in edges:
            above = min(height[target] + 1, highest)
            height[source] = max(height[source], above)
    tallest = max(height.values())
    return {name: tallest - height[name] for name in names}


def _places(layers: list[list[str]], chains: list[list[str]]) -> tuple[dict[str, Point], float]:
    """Return the position of each node (the centre of its top edge, in pixels), and the drawing's width in
    pixels.

    Repeated passes down and up sort the nodes of each layer by the mean position of their neighbours. At the
    end each node moves to a place straight below its input, where there is room.
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
    """Return two dicts by node: its neighbours (nodes joined to it by an edge) in the layer above, and its
    neighbours in the layers above and below.
    """
    above: dict[str, list[str]] = {}
    beside: dict[str, list[str]] = {}
    for chain in chains:
        for upper, lower in itertools.pairwise(chain):
            above.setdefault(lower, []).append(upper)
            beside.setdefault(upper, []).append(lower)
            beside.setdefault(lower, []).append(upper)
    return above, beside


def _mean(nodes: Sequence[str], centre: Mapping[str, float], default: float) -> float:
    """Return the mean of the centres of `nodes`, in pixels, or `default` if there are none."""
    if not nodes:
        return default
    return sum(centre[node] for node in nodes) / len(nodes)


def _under(node: str, above: Sequence[str], centre: Mapping[str, float]) -> float:
    """Return the x coordinate at which the node stands straight below its first input of the same kind
    (box or lane).

    If it has no such input, return the mean of all inputs' centres. `above` are its inputs.
    """
    same_kind = [other for other in above if _is_lane(other) == _is_lane(node)]
    return _mean(same_kind[:1] or above, centre, 0.0)


def _is_lane(node: str) -> bool:
    """Return True for a lane, False for a box."""
    return "\0" in node


def _span(node: str) -> float:
    """Return the width in pixels that a node takes in its layer, gaps included."""
    return _LANE if _is_lane(node) else _WIDTH + _GAP_X


def _set_in_row(
    layer: list[str], centre: dict[str, float], width: float, wanted: Mapping[str, float]
) -> None:
    """Store in `centre` the x coordinates of a layer's nodes, each as near to its entry in `wanted` as
    possible.

    The nodes keep their order, do not overlap, and stay within `width` pixels; a node without an entry is set
    as far left as possible.
    """
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
    """Return the SVG path of an edge: from the bottom of the first box, down through the lanes, to the top
    of the last box.

    `points` are the positions of the chain's nodes. Each curve leaves a layer and enters the next one
    steeply, and crosses in the middle between them, so that it keeps away from the boxes that it passes.
    """
    x, y = points[0]
    y += _HEIGHT
    path = f"M{x:.1f},{y:.1f}"
    for i, (to_x, to_y) in enumerate(points[1:], 1):
        path += f"C{x:.1f},{to_y:.1f} {to_x:.1f},{y:.1f} {to_x:.1f},{to_y:.1f}"
        x = to_x
        y = to_y
        if i < len(points) - 1:
            y += _HEIGHT
            path += f"V{y:.1f}"
    return f'<path d="{path}"/>'


def _box(box: Box, x: float, y: float) -> str:
    """Return the SVG of one box: name, caption in both languages, progress bar and link. `x`, `y` is the
    centre of its top edge.

    It uses attributes and no `style`, because the content security policy of the studio (the served web
    pages) refuses inline styles.
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
    """Return the SVG of the progress bar at the bottom of a box, or "" if `share`, the part that is done,
    is 0.

    `left` and `y` are the box's left and top edge.
    """
    if not share:
        return ""
    width = _WIDTH * min(1.0, share)
    place = f'x="{left:.1f}" y="{y + _HEIGHT - 4}" width="{width:.1f}" height="4"'
    return f'<rect class="share" {place} rx="2"/>'


def _name(name: str, x: float, y: float) -> str:
    """Return the SVG text of a box's name, in a smaller font if the name is long."""
    size = 13 if len(name) <= 15 else 13 * 15 / len(name)
    place = f'x="{x:.1f}" y="{y + 18:.1f}"'
    return f'<text class="name" font-size="{size:.1f}px" {place}>{escape(name)}</text>'


def _captions(caption: Text, x: float, y: float) -> str:
    """Return the SVG texts of a box's caption, one for each language; the page shows one of them."""
    place = f'x="{x:.1f}" y="{y + 33:.1f}"'
    texts = ""
    for language in ("en", "zh"):
        text = escape(getattr(caption, language))
        texts += f'<text class="caption {language}" {place}>{text}</text>'
    return texts
