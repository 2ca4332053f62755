"""Renamed settings: recipes with old names can still be read, and stored artifacts keep the names they were
stored with.

`RENAMED` is the table of all renamed settings, `KINDS` that of the renamed stage kinds. `rename` replaces
old names in a recipe's YAML tree before it is validated. `stored` replaces current names by the old ones
where settings are hashed into an artifact's key or written into its manifest, so that renaming a setting
changes no key."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..types import LimbeckError


@dataclass(frozen=True)
class Alias:
    """One renamed setting of a stage: its old name, its new name, and where it is.

    `kind` is the kind of stage that has the setting, empty for any kind. `inside` is the path of the mapping
    that holds it within the stage: `("shape", "latent")`, or empty for the stage itself."""

    old: str
    new: str
    kind: str = ""
    inside: tuple[str, ...] = ()

    def applies(self, kind: Any, inside: tuple[str, ...]) -> bool:
        """Return True if the setting belongs to the mapping at the path `inside` of a stage of this kind."""
        return self.inside == inside and self.kind in ("", kind)


KINDS = {"preference": "dpo"}
RENAMED = (
    Alias("patience", "timeout", "remote"),
    Alias("concurrent", "max_concurrency", "remote"),
    Alias("opinions", "learned_rewards", "rl"),
    Alias("predicted", "mtp_layers", "pretrain", ("shape",)),
    Alias("kv_rank", "kv_lora_rank", "pretrain", ("shape", "latent")),
    Alias("ahead_weight", "mtp_loss_weight", "", ("optimizer",)),
)
PROBLEMS = (Alias("instruction", "template"),)  # of sources of problems, whatever their `source`
_noticed: set[str] = set()


def rename(tree: dict) -> list[Alias]:
    """Replace the old names in a recipe's YAML tree, in place; return an alias for each old name that was
    found, including old names of stage kinds.

    Raises LimbeckError where a mapping has a setting under both its old and its new name."""
    aliases = _rename_problems(tree)
    stages = tree.get("stages")
    if not isinstance(stages, dict):
        return aliases
    for name, stage in stages.items():
        if isinstance(stage, dict):
            aliases += _rename_stage(f"stages.{name}", stage)
    return aliases


def rename_path(path: list[str], tree: dict) -> list[Alias]:
    """Replace the old names in a path into a recipe's tree, such as `["stages", "far", "patience"]`, in
    place; return the aliases of the names replaced."""
    aliases: list[Alias] = []
    if len(path) == 3 and path[0] == "problems":
        for alias in PROBLEMS:
            if path[2] == alias.old:
                path[2] = alias.new
                aliases.append(alias)
    if len(path) < 3 or path[0] != "stages":
        return aliases
    kind = _kind_at(tree, path[1])
    for i in range(2, len(path)):
        for alias in RENAMED:
            if path[i] == alias.old and alias.applies(kind, tuple(path[2:i])):
                path[i] = alias.new
                aliases.append(alias)
    return aliases


def notify(aliases: list[Alias]) -> None:
    """Print a notice of the new name for each old name to standard error, at most once per old name in a
    process."""
    for alias in aliases:
        if alias.old not in _noticed:
            _noticed.add(alias.old)
            print(
                f"limbeck: `{alias.old}` in a recipe is called `{alias.new}` now; the old word is still read",
                file=sys.stderr,
            )


def stored(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's settings under the names that are used in keys and manifests."""
    kind = settings.get("kind")
    settings = _stored_mapping(settings, kind, ())
    if "kind" in settings:
        settings["kind"] = stored_kind(kind)
    return settings


def stored_problems(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a source of problems under the names that are used in keys."""
    words = {alias.new: alias.old for alias in PROBLEMS}
    return {words.get(key, key): value for key, value in settings.items()}


def current_name(setting: str) -> str:
    """Return the name of a setting of a source of problems that was stored under an old name, with dots, such
    as `problems.mine.template` for `problems.mine.instruction`; any other name unchanged."""
    path = setting.split(".")
    rename_path(path, {})
    return ".".join(path)


def stored_kind(kind: str) -> str:
    """Return the name of a stage kind in keys, manifests and folder names of artifacts, such as `preference`
    for `dpo`."""
    return next((old for old, new in KINDS.items() if new == kind), kind)


def current_kind(kind: str) -> str:
    """Return the current name of a stage kind that was stored under an old name, such as `dpo` for
    `preference`."""
    return KINDS.get(kind, kind)


def _rename_problems(tree: dict) -> list[Alias]:
    """Replace the old names in a recipe's sources of problems, in place; return the aliases of the names
    replaced."""
    aliases: list[Alias] = []
    problems = tree.get("problems")
    for name, source in problems.items() if isinstance(problems, dict) else ():
        if isinstance(source, dict):
            aliases += _rename_keys(f"problems.{name}", source, PROBLEMS)
    return aliases


def _rename_keys(place: str, mapping: dict, candidates: Sequence[Alias]) -> list[Alias]:
    """Replace the old names among the keys of a mapping, in place; return the aliases of the names replaced.
    `place` names the mapping in error messages."""
    aliases: list[Alias] = []
    for alias in candidates:
        if alias.old not in mapping:
            continue
        if alias.new in mapping:
            raise LimbeckError(
                f"{place} has {alias.old} and {alias.new}, the old and the new word for one setting; "
                f"keep {alias.new}"
            )
        _replace_key(mapping, alias)
        aliases.append(alias)
    return aliases


def _rename_stage(place: str, stage: dict) -> list[Alias]:
    """Replace the old names in one stage's settings, in place; return the aliases of the names replaced.
    `place` names the stage in error messages."""
    aliases: list[Alias] = []
    kind = stage.get("kind")
    if isinstance(kind, str) and kind in KINDS:
        stage["kind"] = KINDS[kind]
        aliases.append(Alias(f"kind: {kind}", f"kind: {stage['kind']}"))
    for alias in RENAMED:
        if alias.applies(stage.get("kind"), alias.inside):
            mapping = _mapping_inside(stage, alias.inside)
            aliases += _rename_keys(".".join([place, *alias.inside]), mapping, (alias,))
    return aliases


def _replace_key(mapping: dict, alias: Alias) -> None:
    """Replace the alias's old key of a mapping by the new one, in place; the order of the keys does not
    change."""
    items = [(alias.new if key == alias.old else key, value) for key, value in mapping.items()]
    mapping.clear()
    mapping.update(items)


def _mapping_inside(stage: dict, inside: tuple[str, ...]) -> dict:
    """Return the mapping at the path `inside` of a stage; an empty mapping if there is none."""
    mapping: Any = stage
    for key in inside:
        mapping = mapping.get(key)
        if not isinstance(mapping, dict):
            return {}
    return mapping


def _kind_at(tree: dict, name: str) -> Any:
    """Return the kind of the stage `name` in a recipe's YAML tree; None if the stage or its kind is
    missing."""
    stages = tree.get("stages")
    stage = stages.get(name) if isinstance(stages, dict) else None
    return stage.get("kind") if isinstance(stage, dict) else None


def _stored_mapping(mapping: dict[str, Any], kind: Any, inside: tuple[str, ...]) -> dict[str, Any]:
    """Return the mapping at the path `inside` of a stage, and all mappings within it, under the stored
    names."""
    words = {alias.new: alias.old for alias in _aliases_of(kind, inside)}
    settings = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            value = _stored_mapping(value, kind, (*inside, key))
        settings[words.get(key, key)] = value
    return settings


def _aliases_of(kind: Any, inside: tuple[str, ...]) -> Iterator[Alias]:
    """Yield the aliases of the settings that the mapping at the path `inside` of a stage of this kind may
    have."""
    return (alias for alias in RENAMED if alias.applies(kind, inside))
