"""The drawing of a run's stages: no line touches a box that it neither leaves nor enters."""

from __future__ import annotations

import re

import numpy as np
import pytest
from test_keys import RECIPES

from limbeck.config.load import load
from limbeck.report import graph_drawing
from limbeck.report.graph_drawing import _HEIGHT, _WIDTH, Box
from limbeck.report.i18n import Text

CLEAR = 4.0  # pixels between a line and a foreign box, at least
Edge = tuple[str, str]


def inputs_of(stage: dict, names: list[str]) -> tuple[str, ...]:
    """The names of other stages anywhere in a stage's settings."""
    cited = []

    def search(value) -> None:
        if isinstance(value, str):
            cited.append(value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                search(key), search(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                search(inner)

    search(stage)
    return tuple(dict.fromkeys(name for name in cited if name in names))


def recipe_graph(path) -> dict[str, tuple[str, ...]]:
    stages = {name: stage.model_dump(mode="json") for name, stage in load(path).stages.items()}
    names = list(stages)
    return {name: inputs_of(stage, names[: names.index(name)]) for name, stage in stages.items()}


def random_graph(seed: int) -> dict[str, tuple[str, ...]]:
    dice = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(int(dice.integers(2, 24)))]
    graph = {}
    for i, name in enumerate(names):
        count = min(i, int(dice.integers(0, 4)))
        graph[name] = tuple(names[j] for j in sorted(dice.choice(i, count, replace=False))) if count else ()
    return graph


def outline(path: str) -> np.ndarray:
    """Points [N, 2] along an SVG path of M, V and C commands, close to one another."""
    points = []
    for command, numbers in re.findall(r"([MVC])([^MVC]*)", path):
        values = [float(number) for number in re.findall(r"-?[\d.]+", numbers)]
        if command == "M":
            points.append(np.array([values]))
            continue
        start = points[-1][-1]
        t = np.linspace(0, 1, 200)[:, None]
        if command == "V":
            corners = np.array([start, start, [start[0], values[0]], [start[0], values[0]]])
        else:
            corners = np.array([start, *np.reshape(values, (3, 2))])
        a, b, c, d = corners
        points.append((1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d)
    return np.concatenate(points)


def distance(points: np.ndarray, corner: np.ndarray) -> float:
    """The least distance of the points from a box with this left top corner."""
    size = np.array([_WIDTH, _HEIGHT])
    outside = np.maximum(0, np.maximum(corner - points, points - corner - size))
    return float(np.sqrt((outside**2).sum(1)).min())


def nearest(graph: dict[str, tuple[str, ...]]) -> tuple[float, Edge, str]:
    """The least distance of a line from a foreign box, the line's ends, and the box."""
    svg = str(graph_drawing.draw([Box(name, Text("", ""), inputs, "box") for name, inputs in graph.items()]))
    corners = re.findall(r'<rect class="box" x="([\d.-]+)" y="([\d.-]+)"', svg)
    paths = re.findall(r'<path d="([^"]+)"/>', svg)
    edges = [(source, name) for name, inputs in graph.items() for source in inputs]
    assert len(corners) == len(graph) and len(paths) == len(edges)
    boxes = dict(zip(graph, np.array(corners, dtype=float), strict=True))
    found = [(float("inf"), ("", ""), "")]
    for edge, path in zip(edges, paths, strict=True):
        points = outline(path)
        ends = [distance(points[[0, -1]], boxes[name]) for name in edge]
        assert ends == [0, 0], edge
        found += [(distance(points, boxes[name]), edge, name) for name in boxes if name not in edge]
    return min(found)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_lines_of_shipped_recipes_keep_away_from_foreign_boxes(path):
    graph = recipe_graph(path)
    assert any(graph.values()) or len(graph) < 3
    assert nearest(graph)[0] >= CLEAR


def test_lines_of_any_graph_keep_away_from_foreign_boxes():
    for seed in range(60):
        assert nearest(random_graph(seed))[0] >= CLEAR, seed
