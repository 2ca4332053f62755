"""A model as others can load it: weights, tokenizer, card, checksums, its lineage, and the recipe that makes it again.

Nothing of the house goes along but what is needed: no rows, no paths, and people as `reviewer 1`, not by name.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.aliases import current_kind
from ...config.load import dump
from ...config.load import load as read_recipe
from ...config.recipe import Evaluate, Files, Load, Recipe, Report, Stage, inputs, sources
from ...config.validate import MODELS
from ...types import LimbeckError
from ..dataset_rows import learned_rows, said
from ..store import Artifact, Store, digest_file, digest_of, sync_below, write
from .card import card
from .licences import NOBODY_KNOWS, bind, terms
from .lineage import RELEASED, Lineage, find_artifact, indexes, lineage_of
from .propagate import LEARNING

SUMS = "SHA256SUMS"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Released:
    """A directory that was written, and what its maker still has to know: `Released(Path("out"), ("no GGUF: ...",))`."""

    folder: Path
    notes: tuple[str, ...]


def release(model: str, out: Path, runs: Path, name: str = "", gguf: str = "auto") -> Released:
    """Write the directory; it appears whole or not at all. `gguf` is a type of `limbeck export`, `none`, or `auto`, which
    leaves the file out where the format cannot hold the model.

    Raises LimbeckError, naming clause and remedy, where a licence forbids the release or the name breaks a duty.
    """
    artifact, store = find_artifact(model, runs)
    name = name or out.resolve().name
    if artifact.kind not in MODELS:
        raise LimbeckError(f"{model} is a {artifact.kind} stage, which has no model to release")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LimbeckError(f"{out} is there already; choose another directory, or remove it")
    lineage = lineage_of(artifact, store)
    refuse(lineage, name)
    recipe = recipe_of(artifact, store)
    part = out.resolve().parent / f".{out.resolve().name}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(artifact.folder / "model", part)
    try:
        notes = [*_add_gguf(part, name, gguf), *_add_licences(part, lineage)]
        told = public(lineage)
        write(part / RELEASED, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        write(part / "recipe.yaml", dump(recipe))
        write(
            part / "README.md",
            card(name, told, evaluations(artifact, store), [path.name for path in part.glob("*.gguf")]),
        )
        files = sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
        write(part / SUMS, "".join(f"{digest_file(part / file)}  {file}\n" for file in files))
        sync_below(part)
        if out.exists():
            out.rmdir()
        part.rename(out.resolve())
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Released(out, (*notes, *duties(lineage)))


def refuse(lineage: Lineage, name: str) -> None:
    """Raise where a licence forbids handing the model on, or the name it is to have breaks a naming duty."""
    stage, claimed = lineage.head["stage"], {right["licence"] for right in lineage.head.get("rights", [])}
    for licence in lineage.licences:
        if terms(licence).release != "no" or licence in claimed:
            continue
        bound = [entry["stage"] for entry in lineage.entries.values() if licence in entry["licences"]]
        if terms(licence) is NOBODY_KNOWS:
            raise LimbeckError(
                f"{stage} cannot be released: nobody knows the terms {licence!r} of {bound[-1]}; declare its licence and run again"
            )
        clause = terms(licence).clause("release")
        raise LimbeckError(
            f"{stage} cannot be released: {licence}, which it has from {bound[-1]}, forbids that: {clause}; train it without"
        )
    for licence in lineage.licences:
        prefix = terms(licence).prefix
        if prefix and not re.sub(r"[-_ ]+", " ", name).startswith(prefix):
            better = f"{prefix.replace(' ', '-')}-{name}"
            raise LimbeckError(
                f"{name}: a model bound by {licence} must have a name that begins with {prefix!r} ({terms(licence).clause('prefix')}); "
                f"say --name {better}"
            )


def duties(lineage: Lineage) -> list[str]:
    """What whoever publishes the model has to see to."""
    found = [
        f"{licence}: {'; '.join(terms(licence).duties)}"
        for licence in lineage.licences
        if terms(licence).duties
    ]
    return [*found, *(f"show “{text}” where you present it" for text in bind(lineage.licences).display)]


# ---------------------------------------------------------------- what goes along


def _add_gguf(part: Path, name: str, kind: str) -> list[str]:
    if kind == "none":
        return []
    from ...model import gguf

    wanted = "f16" if kind == "auto" else kind
    try:
        gguf.write(part, part / f"{name}-{wanted}.gguf", wanted)
    except LimbeckError as error:
        if kind != "auto":
            raise
        return [f"no GGUF file: {str(error).replace(f'{part}/', '')}"]
    return []


def _add_licences(part: Path, lineage: Lineage) -> list[str]:
    """Licence files of the models that were brought in, where they still lie beside them, and a notice of who asks what."""
    for entry in lineage.entries.values():
        source = (
            Path(entry["settings"].get("path") or "/nowhere") if entry["kind"] == "load" else Path("/nowhere")
        )
        for path in (
            p for pattern in LICENCE_FILES if source.is_dir() for p in source.glob(pattern) if p.is_file()
        ):
            shutil.copyfile(path, part / f"{entry['stage']}-{path.name}")
    if lineage.licences:
        lines = [
            f"{licence}: {terms(licence).title}, {terms(licence).source}" for licence in lineage.licences
        ]
        write(
            part / "NOTICE",
            "This model is bound by\n"
            + "".join(f"  {line}\n" for line in lines)
            + "Its weights were changed by training.\n",
        )
    return []


def evaluations(artifact: Artifact, store: Store) -> list[dict[str, Any]]:
    """Every evaluation of these very weights; not those that force something on them."""
    key = artifact.manifest["key"]
    found = [
        a
        for a in store.all()
        if a.manifest["kind"] == "evaluate" and any(i["key"] == key for i in a.manifest["inputs"].values())
    ]
    told = [json.loads((a.folder / "evaluation.json").read_text(encoding="utf-8")) for a in found]
    return [one for one in told if not one.get("control")]


def public(lineage: Lineage) -> dict[str, Any]:
    """The lineage without what is nobody else's business: no names of people, no paths, rows as a count and a digest."""
    people = sorted(
        {
            name
            for entry in lineage.entries.values()
            for name in entry["sources"].get("editors", [])
            if not name.startswith("policy: ")
        }
    )
    called = {name: f"reviewer {number}" for number, name in enumerate(people, 1)}
    entries = {}
    for key, entry in lineage.entries.items():
        settings = {k: Path(v).name if k == "path" else v for k, v in entry["settings"].items()}
        notes = {
            k: [called.get(n, n) for n in v] if k == "reviewers" else v
            for k, v in (entry.get("notes") or {}).items()
        }
        kept = {**entry, "settings": settings, "notes": notes, "sources": _renamed(entry["sources"], called)}
        kept["rights"] = [{k: v for k, v in right.items() if k != "by"} for right in entry.get("rights", [])]
        if current_kind(entry["kind"]) in LEARNING and (rows := _rows(lineage, key)):
            kept["rows"] = {"count": len(rows), "sha256": digest_of(rows)}
        entries[key] = kept
    return Lineage(lineage.root, entries).tell()


def _renamed(sources: Mapping[str, list[str]], called: Mapping[str, str]) -> dict[str, list[str]]:
    return {
        kind: [called.get(name, name) for name in names] if kind == "editors" else list(names)
        for kind, names in sources.items()
    }


def _rows(lineage: Lineage, key: str) -> list[Any]:
    folders = {
        name: lineage.store.root / lineage.entries[parent]["artifact"]
        for name, parent in lineage.parents(key).items()
    }
    return [[row["id"], said(row), times] for _, row, times in learned_rows(lineage.entries[key], folders)]


# ---------------------------------------------------------------- the recipe


def recipe_of(artifact: Artifact, store: Store) -> Recipe:
    """The part of a run's recipe that the model depends on, and the evaluations, of this model alone."""
    stage = artifact.manifest["stage"]
    for run, stages in indexes(store.root.parent).items():
        path = store.root.parent / run / "recipe.yaml"
        if stages.get(stage) == artifact.folder.name and path.exists():
            return part_of(read_recipe(path), stage)
    raise LimbeckError(
        f"{artifact.folder.name}: no run in {store.root.parent} has it as its stage {stage}; run its recipe again first"
    )


def part_of(recipe: Recipe, name: str) -> Recipe:
    """The stages behind one, with the problems that they cite; files and models by their name alone."""
    needed = _behind(recipe, name, set())
    stages: dict[str, Stage] = {}
    for cited, stage in recipe.stages.items():
        if isinstance(stage, Evaluate):  # what it asks also decides what nobody may learn from
            stages[cited] = stage.model_copy(update={"models": [name], "forced": [], "retry": {}})
        elif cited in needed and not isinstance(stage, Report):
            stages[cited] = (
                stage.model_copy(update={"path": Path(stage.path).name}) if isinstance(stage, Load) else stage
            )
    asked = {
        source for stage in stages.values() for source in [*sources(stage), *getattr(stage, "teachers", ())]
    }
    problems = {
        cited: one.model_copy(update={"path": Path(one.path).name}) if isinstance(one, Files) else one
        for cited, one in recipe.problems.items()
        if cited in asked or _desk_knows(one, stages)
    }
    return recipe.model_copy(update={"stages": stages, "problems": problems})


def _behind(recipe: Recipe, name: str, found: set[str]) -> set[str]:
    if name not in found:
        found.add(name)
        stage = recipe.stages[name]
        for cited in [*inputs(stage), *(s for s in sources(stage) if s in recipe.stages)]:
            _behind(recipe, cited, found)
    return found


def _desk_knows(problems: Any, stages: Mapping[str, Stage]) -> bool:
    """A desk's policy may ask any miniature how to translate, so that all of them are in its key."""
    return problems.source == "miniature" and any(stage.kind == "curate" for stage in stages.values())
