"""Generated tables of the documentation: the settings of recipes and the commands.

    python docs/generate.py            update them, between their marks in docs/**/*.md
    python docs/generate.py --check    change nothing; exit code 1 and the names of outdated pages

A part stands between `<!-- generated: NAME ARGUMENT -->` and `<!-- end -->`.
"""

from __future__ import annotations

import os
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["USER"] = "$USER"  # a default of the command line that is not the same for everybody

import typer
import yaml
from pydantic.fields import FieldInfo

from limbeck.cli import app
from limbeck.config import learned_rewards, recipe
from limbeck.config import parts as pieces
from limbeck.pipeline.graph import QUIET

DOCS = Path(__file__).parent
PART = re.compile(r"(<!-- generated: (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
TAGS = ("kind", "source")
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def main(check: bool) -> int:
    """Update every page, or only check it; return the exit code."""
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        written = page.read_text(encoding="utf-8")
        fresh = render(written)
        if fresh != written:
            stale.append(page.name)
            if not check:
                page.write_text(fresh, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'written'}: {', '.join(stale)}")
    return int(check and bool(stale))


def render(text: str) -> str:
    """The text of a page with its generated parts up to date."""
    return PART.sub(lambda m: f"{m[1]}\n{PARTS[m[2]](m[3]).strip()}\n\n{m[4]}", text)


# ---------------------------------------------------------------- settings


def settings(name: str) -> str:
    """A table of the keys of one settings class. Keys of every stage are listed under `Stage` only."""
    model = next(getattr(place, name) for place in (recipe, learned_rewards, pieces) if hasattr(place, name))
    common, mark = (recipe.Stage.model_fields, "") if name != "Stage" else ({}, " \\*")
    rows = [
        [f"`{key}`{mark if key in QUIET else ''}", value(field), default(field), field.description or ""]
        for key, field in model.model_fields.items()
        if key not in (*TAGS, *common)
    ]
    return table(["key", "value", "default", "meaning"], rows)


def value(field: FieldInfo) -> str:
    """The allowed values in words: `integer, at least 1`."""
    limits = {name: getattr(part, name) for part in field.metadata for name in LIMITS if hasattr(part, name)}
    words = " and ".join(f"{LIMITS[name]} {limit}" for name, limit in limits.items())
    what, _, nothing = kind(field.annotation).partition(" or ") if words else (kind(field.annotation), "", "")
    return ", ".join(part for part in (what, words) if part) + (f", or {nothing}" if nothing else "")


def kind(annotation: Any) -> str:
    """A type annotation in words."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in NAMES:
        return NAMES[annotation]
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in parts)
    if origin in (types.UnionType, typing.Union) and type(None) in parts:
        return f"{kind(parts[0])} or `null`"
    if origin is tuple:
        return " and ".join(map(kind, parts))
    if origin is list:
        return f"list of {'names' if parts[0] is str else kind(parts[0])}"
    if origin is dict:
        return f"{'names' if parts[0] is str else kind(parts[0])}, each with {_single(kind(parts[1]))}"
    if isinstance(annotation, type) and issubclass(annotation, pieces.Settings):
        return f"[{annotation.__name__.lower()}](#{annotation.__name__.lower()})"
    return "a source of problems" if "Miniature" in str(annotation) else "a stage"


def default(field: FieldInfo) -> str:
    """The default as YAML, or **required**."""
    if field.is_required():
        return "**required**"
    chosen = field.default
    if isinstance(chosen, pieces.Settings):
        chosen = chosen.model_dump(mode="json", exclude_unset=True)
        return code(chosen) if chosen else "its own"
    return code(list(chosen) if isinstance(chosen, tuple) else chosen)


def code(chosen: Any) -> str:
    """A value as inline YAML code."""
    if chosen == "":
        return "none"
    text = yaml.safe_dump(chosen, default_flow_style=True, width=1000, sort_keys=False, allow_unicode=True)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"  # YAML ends a bare scalar with ...


def presets(_: None) -> str:
    """A table of the settings in which the presets differ."""
    names = list(pieces.PRESETS)
    keys = dict.fromkeys(key for preset in pieces.PRESETS.values() for key in preset)
    policies = [pieces.Policy(preset=name) for name in names]
    rows = [[f"`{key}`", *(code(getattr(policy, key)) for policy in policies)] for key in keys]
    return table(["key", *(f"`{name}`" for name in names)], rows)


def _single(word: str) -> str:
    return f"a {word}" if word in ("number", "text") else word


# ---------------------------------------------------------------- commands


def commands(_: None) -> str:
    """Every command with its options, as in `--help`."""
    group = typer.main.get_command(app)
    return "\n\n".join(command(name, one) for name, one in group.commands.items())


def command(name: str, one: Any) -> str:
    """One command: help, usage, and a table of its parameters."""
    arguments = [p for p in one.params if p.param_type_name == "argument"]
    options = [p for p in one.params if p.param_type_name == "option" and p.name != "help"]
    shown = [metavar(p) if p.required else f"[{metavar(p)}]" for p in arguments]
    usage = " ".join(["limbeck", name, *shown, "[OPTIONS]"])
    rows = [[f"`{metavar(p)}`", preset(p), p.help or ""] for p in arguments]
    rows += [[f"`{', '.join(p.opts)}`", preset(p), p.help or ""] for p in options]
    text = " ".join((one.help or "").split())
    parameters = table(["", "default", "meaning"], rows)
    return f"## limbeck {name}\n\n{text}\n\n```text\n{usage}\n```\n\n{parameters}"


def metavar(parameter: Any) -> str:
    """A parameter's name in the usage line."""
    return parameter.metavar or parameter.name.upper()


def preset(parameter: Any) -> str:
    """A parameter's default; empty for switches and for options without one."""
    silent = parameter.default is False or parameter.default in (None, "", []) or callable(parameter.default)
    return "**required**" if parameter.required else "" if silent else f"`{parameter.default}`"


# ---------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PARTS: dict[str, Callable[[Any], str]] = {
    "settings": settings, "presets": presets, "commands": commands,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
