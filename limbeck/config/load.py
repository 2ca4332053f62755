"""Recipes from YAML and back to YAML; a mistake becomes one sentence with what was probably meant.

Reading a recipe imports no torch.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import yaml
from pydantic import ValidationError

from ..types import LimbeckError
from . import aliases
from .recipe import Curate, Recipe
from .validate import check_references, explain


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every default spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def with_auto_curation(recipe: Recipe) -> Recipe:
    """The recipe with each curate stage's policy in the place of people."""
    stages = dict(recipe.stages)
    for name, stage in stages.items():
        if isinstance(stage, Curate):
            stages[name] = stage.model_copy(update={"auto": True})
    return recipe.model_copy(update={"stages": stages})


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, from a file or by the name of a shipped one; `overrides` are `key.path=value` pairs. Old words
    are read as new ones.

    Each old word gives one notice on standard error. Raises LimbeckError with one sentence for the first
    mistake.
    """
    path = find(path)
    tree = _read_tree(path)
    try:
        renamed = aliases.rename(tree)
    except LimbeckError as error:
        raise LimbeckError(f"{path}: {error}") from None
    for override in overrides:
        renamed += _override(tree, override)
    aliases.notify(renamed)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise LimbeckError(f"{path}: {explain(error, tree)}") from None
    check_references(path, recipe)
    return recipe


def shipped() -> dict[str, Path]:
    """The recipes that come with Limbeck, by name: `quickstart`."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))}


def find(recipe: str | Path) -> Path:
    """The file of a recipe: the path itself, or if there is none and it is a name, that of a shipped recipe."""
    path = Path(recipe)
    if path.exists():
        return path
    return shipped().get(str(recipe), path)


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses the same key twice in one mapping; plain YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of a YAML node. Raises ConstructorError where a key appears twice."""
        key_nodes = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys: list = []
        for key_node in key_nodes:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", key_node.start_mark
                )
            keys.append(key)
        return super().construct_mapping(node, deep)


def _read_tree(path: Path) -> dict:
    """The YAML tree of a recipe's file. Raises LimbeckError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = ", ".join(shipped())
        raise LimbeckError(
            f"{path}: no such recipe; recipes that come with Limbeck: {names or 'none found'}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LimbeckError(f"{path}: cannot be read as text ({error})") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        sentence = " ".join(str(error).split())
        raise LimbeckError(f"{path}: not valid YAML: {sentence}") from None
    if not isinstance(tree, dict):
        raise LimbeckError(f"{path}: a recipe is a mapping with the keys name, problems and stages")
    return tree


def _override(tree: dict, override: str) -> list[aliases.Alias]:
    """Set one `key.path=value` in a recipe's tree; return the aliases of its old words."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise LimbeckError(f"--set {override}: write key.path=value, for instance stages.zero.steps=10")
    keys = key.split(".")
    renamed = aliases.rename_path(keys, tree)
    mapping = tree
    for parent, child in pairwise(keys):
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise LimbeckError(f"--set {override}: {parent} is not a mapping, so it has no key {child}")
    try:
        mapping[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise LimbeckError(f"--set {override}: the value is not valid YAML") from None
    try:
        return renamed + aliases.rename(tree)
    except LimbeckError as error:
        raise LimbeckError(f"--set {override}: {error}") from None
