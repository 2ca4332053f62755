"""Earlier words of a recipe: old recipes stay readable, and artifacts keep the words they were stored with.

`RENAMED` is the one table. `rename` maps a recipe's YAML tree to today's words before it is validated.
`stored` maps a stage's settings back where they are hashed or written into a manifest, so a new word changes
no key.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..types import LimbeckError


@dataclass(frozen=True)
class Alias:
    """A renamed setting of a stage: its mapping inside the stage, its old and its new word.

    `kind` is the stage kind that has the setting; empty means any kind.
    """

    old: str
    new: str
    kind: str = ""
    inside: tuple[str, ...] = ()

    def applies(self, kind: Any, inside: tuple[str, ...]) -> bool:
        """True if a mapping `inside` a stage of `kind` holds this setting."""
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
_noticed: set[str] = set()


def rename(tree: dict) -> list[Alias]:
    """Replace the old words of a recipe's YAML tree in place; return their aliases, a kind's among them.

    Raises LimbeckError where a mapping has a setting under its old and its new word.
    """
    aliases: list[Alias] = []
    stages = tree.get("stages")
    if not isinstance(stages, dict):
        return aliases
    for name, stage in stages.items():
        if isinstance(stage, dict):
            aliases += _rename_stage(f"stages.{name}", stage)
    return aliases


def rename_path(path: list[str], tree: dict) -> list[Alias]:
    """Replace the old words of a path, `["stages", "far", "patience"]`, in place; return their aliases."""
    aliases: list[Alias] = []
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
    """Print the new word for each old word to standard error, once for each in a process."""
    for alias in aliases:
        if alias.old not in _noticed:
            _noticed.add(alias.old)
            print(
                f"limbeck: `{alias.old}` in a recipe is called `{alias.new}` now; the old word is still read",
                file=sys.stderr,
            )


def stored(settings: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings in the words that keys and manifests have."""
    kind = settings.get("kind")
    settings = _stored_mapping(settings, kind, ())
    if "kind" in settings:
        settings["kind"] = stored_kind(kind)
    return settings


def stored_kind(kind: str) -> str:
    """The kind in a key, a manifest and an artifact's folder name: `preference` for `dpo`."""
    return next((old for old, new in KINDS.items() if new == kind), kind)


def current_kind(kind: str) -> str:
    """Today's word for a stored kind: `dpo` for `preference`."""
    return KINDS.get(kind, kind)


def _rename_stage(place: str, stage: dict) -> list[Alias]:
    """Replace the old words of one stage's settings in place; return their aliases."""
    aliases: list[Alias] = []
    kind = stage.get("kind")
    if isinstance(kind, str) and kind in KINDS:
        stage["kind"] = KINDS[kind]
        aliases.append(Alias(f"kind: {kind}", f"kind: {stage['kind']}"))
    for alias in RENAMED:
        if not alias.applies(stage.get("kind"), alias.inside):
            continue
        mapping = _mapping_inside(stage, alias.inside)
        if alias.old not in mapping:
            continue
        if alias.new in mapping:
            where = ".".join([place, *alias.inside])
            raise LimbeckError(
                f"{where} has {alias.old} and {alias.new}, the old and the new word for one setting; "
                f"keep {alias.new}"
            )
        _replace_key(mapping, alias)
        aliases.append(alias)
    return aliases


def _replace_key(mapping: dict, alias: Alias) -> None:
    """Give a key its new word; the order of the keys stays."""
    items = [(alias.new if key == alias.old else key, value) for key, value in mapping.items()]
    mapping.clear()
    mapping.update(items)


def _mapping_inside(stage: dict, inside: tuple[str, ...]) -> dict:
    """The mapping at a path inside a stage; an empty one where there is none."""
    mapping: Any = stage
    for key in inside:
        mapping = mapping.get(key)
        if not isinstance(mapping, dict):
            return {}
    return mapping


def _kind_at(tree: dict, name: str) -> Any:
    """The kind of a stage in a recipe's YAML tree; None where it has none."""
    stages = tree.get("stages")
    stage = stages.get(name) if isinstance(stages, dict) else None
    return stage.get("kind") if isinstance(stage, dict) else None


def _stored_mapping(mapping: dict[str, Any], kind: Any, inside: tuple[str, ...]) -> dict[str, Any]:
    """A mapping `inside` a stage in the stored words, with the mappings below it."""
    words = {alias.new: alias.old for alias in _aliases_of(kind, inside)}
    settings = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            value = _stored_mapping(value, kind, (*inside, key))
        settings[words.get(key, key)] = value
    return settings


def _aliases_of(kind: Any, inside: tuple[str, ...]) -> Iterator[Alias]:
    """The renamed settings of one mapping `inside` a stage."""
    return (alias for alias in RENAMED if alias.applies(kind, inside))
