"""Reading recipes from YAML and writing them as YAML. A mistake is reported as one sentence that suggests
what was probably meant.

This module does not import torch."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..types import LimbeckError
from . import aliases
from .recipe import Curate, Recipe
from .validate import check_references, explain

# A text that begins with a brace and goes on behind it, such as `template: {problem} Think.`, without quotes.
BARE_BRACE = re.compile(r"\b(template|system): *\{[^}]*\} *[^\s#,}]")


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML, with every default value written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def with_auto_curation(recipe: Recipe) -> Recipe:
    """Return the recipe with every `curate` stage set to decide by its policy, so that no person has to
    review rows."""
    stages = dict(recipe.stages)
    for name, stage in stages.items():
        if isinstance(stage, Curate):
            stages[name] = stage.model_copy(update={"auto": True})
    return recipe.model_copy(update={"stages": stages})


def load(
    source: str | Path | Recipe | Mapping[str, Any],
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe from a file, or by the name of a recipe that comes with the package; a `Recipe`, or a
    mapping of its settings, is checked anew.

    `overrides` are strings `key.path=value` that replace settings. `settings` replace settings too:
    `{"stages.zero.steps": 10}` and `{"stages": {"zero": {"steps": 10}}}` say the same. A mapping is merged
    into the one that it meets; any other value replaces the one before.

    Settings under old names are accepted, with one notice per name on standard error. Raises LimbeckError
    with one sentence about the first mistake."""
    place, tree = _open(source)
    try:
        renamed = aliases.rename(tree)
    except LimbeckError as error:
        raise LimbeckError(f"{place}: {error}") from None
    for override in overrides:
        renamed += _override(tree, override)
    for key, value in _leaves(settings or {}):
        renamed += _replace(tree, key, value, f"setting {'.'.join(key)}")
    aliases.notify(renamed)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise LimbeckError(f"{place}: {explain(error)}") from None
    check_references(place, recipe)
    return recipe


def _open(source: str | Path | Recipe | Mapping[str, Any]) -> tuple[Path, dict]:
    """Return the recipe `source` as a YAML tree that may be changed, and its place for messages."""
    if isinstance(source, Recipe):
        source = source.model_dump(mode="json")
    if isinstance(source, Mapping):
        return Path(f"recipe {source.get('name', 'without a name')}"), copy.deepcopy(dict(source))
    path = find(source)
    return path, _read_extended(path)


def _read_extended(path: Path, behind: tuple[Path, ...] = ()) -> dict:
    """Read a recipe's file as a YAML tree. If it has the key `extends`, the name of another recipe, it is
    merged into that one's tree; a stage that it sets to null is left out. `behind` are the files that extend
    this one."""
    tree = _read_tree(path)
    if "extends" not in tree:
        return tree
    extended = tree.pop("extends")
    if not isinstance(extended, str):
        raise LimbeckError(f"{path}: extends is {extended!r}; name one recipe, such as smollm2-135m")
    beside = path.parent / extended
    other = beside if beside.is_file() else find(extended)
    if other in (path, *behind):
        raise LimbeckError(f"{path}: extends {extended}, which extends this recipe; extend another one")
    whole = _read_extended(other, (path, *behind))
    known = list(whole.get("stages") or {})
    merged = _merge(whole, tree)
    if not isinstance(merged.get("stages"), dict):
        return merged
    left_out = [name for name, stage in merged["stages"].items() if stage is None]
    for name in left_out:
        if name not in known:
            raise LimbeckError(
                f"{path}: stages.{name} is null, but {extended} has no such stage; it has {', '.join(known)}"
            )
        del merged["stages"][name]
    return merged


def _merge(tree: dict, other: dict) -> dict:
    """Merge `other` into a YAML tree, in place, and return the tree: a mapping is merged into the one that it
    meets, and any other value replaces the one before."""
    for key, value in other.items():
        met = tree.get(key)
        tree[key] = _merge(met, value) if isinstance(met, dict) and isinstance(value, dict) else value
    return tree


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[list[str], Any]]:
    """Yield each setting as the parts of its key and its value. Names at the top may be dotted."""
    for name, value in settings.items():
        yield from _leaves_below(str(name).split("."), value)


def _leaves_below(key: list[str], value: Any) -> Iterator[tuple[list[str], Any]]:
    """Yield the values inside `value`, the value of the key `key`; a mapping without entries is a value."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves_below([*key, str(name)], inner)
    else:
        yield key, os.fspath(value) if isinstance(value, os.PathLike) else value


def shipped() -> dict[str, Path]:
    """Return the paths of the recipes that come with the package, by name, such as `quickstart`, or with
    their folder, such as `gpu/qwen3-0.6b`."""
    folder = Path(__file__).parents[1] / "recipes"
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*/*.yaml"))]
    return {path.relative_to(folder).as_posix().removesuffix(".yaml"): path for path in paths}


def find(recipe: str | Path) -> Path:
    """Return the path of a recipe's file. If there is no file `recipe` and it is the name of a recipe that
    comes with the package, that recipe's path is returned. A folder of that name is no recipe."""
    path = Path(recipe)
    if path.is_file():
        return path
    return shipped().get(str(recipe), path)


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key that appears twice in one mapping. The standard loader silently takes
    the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return the mapping of a YAML node. Raises ConstructorError if a key appears twice."""
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
    """Read a recipe's file as a YAML tree. Raises LimbeckError if there is no file, or if the file holds no
    valid mapping."""
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        close = get_close_matches(path.name.removesuffix(".yaml"), shipped(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        names = ", ".join(shipped())
        raise LimbeckError(
            f"{path}: no such recipe; {hint}recipes that come with Limbeck: {names or 'none found'}"
        ) from None
    if not isinstance(tree, dict):
        raise LimbeckError(f"{path}: a recipe is a mapping with the keys name, problems and stages")
    return tree


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds. Raises LimbeckError if it cannot be read, and FileNotFoundError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise LimbeckError(f"{path}: cannot be read as text ({error})") from None
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        sentence = " ".join(str(error).split())
        hint = "; put a text that begins with { into single quotes" if BARE_BRACE.search(text) else ""
        raise LimbeckError(f"{path}: not valid YAML: {sentence}{hint}") from None


def _override(tree: dict, override: str) -> list[aliases.Alias]:
    """Apply one override `key.path=value` to a recipe's YAML tree, in place; return the aliases of old names
    in the override."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise LimbeckError(f"--set {override}: write key.path=value, for instance stages.zero.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise LimbeckError(f"--set {override}: the value is not valid YAML") from None
    return _replace(tree, key.split("."), value, f"--set {override}")


def _replace(tree: dict, keys: list[str], value: Any, place: str) -> list[aliases.Alias]:
    """Replace the setting `keys` of a recipe's YAML tree, in place; return the aliases of old names in it.
    Error messages begin with `place`."""
    renamed = aliases.rename_path(keys, tree)
    mapping = tree
    for parent, child in pairwise(keys):
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise LimbeckError(f"{place}: {parent} is not a mapping, so it has no key {child}")
    mapping[keys[-1]] = value
    try:
        return renamed + aliases.rename(tree)
    except LimbeckError as error:
        raise LimbeckError(f"{place}: {error}") from None
