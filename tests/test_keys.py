"""Stored artifacts stay valid: the keys of all stages of all shipped recipes are those of tests/keys.json.

A key that changes makes everybody compute the stage again. Where that is meant, raise the stage's number in
`pipeline/graph.py`, and write the file anew: `python tests/test_keys.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from limbeck.config.load import load
from limbeck.config.recipe import Files, Load
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.store import Artifact, Store, digest_of

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "limbeck" / "recipes").glob("*.yaml"))
KNOWN = Path(__file__).with_name("keys.json")


class Full(Store):
    """A store in which every stage has been carried out, with a result that is nothing but its key."""

    def find(self, kind: str, key: str) -> Artifact:
        return Artifact(
            self.root / f"{kind}-{key[:16]}",
            {"kind": kind, "key": key, "digest": digest_of(key), "outputs": {}},
        )


def keys(path: Path, folder: Path) -> dict[str, str | None]:
    """Key by node. Models and tables that a recipe reads are files of one line in `folder`."""
    recipe = load(path)
    files = [
        folder / stage.path / "config.json" for stage in recipe.stages.values() if isinstance(stage, Load)
    ]
    files += [folder / source.path for source in recipe.problems.values() if isinstance(source, Files)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}\n", encoding="utf-8")
    graph = Graph(recipe, Full(folder / "store"), folder)
    return {name: node.key for name, node in graph.nodes.items()}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_keys_are_what_they_were(path, tmp_path):
    assert keys(path, tmp_path) == json.loads(KNOWN.read_text(encoding="utf-8"))[path.stem]


def test_every_stage_has_a_key():
    known = json.loads(KNOWN.read_text(encoding="utf-8"))
    assert known.keys() == {path.stem for path in RECIPES}
    assert all(key for recipe in known.values() for key in recipe.values())


def write() -> None:
    """tests/keys.json as the code has it now."""
    found = {}
    for path in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            found[path.stem] = keys(path, Path(folder))
    KNOWN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write())
