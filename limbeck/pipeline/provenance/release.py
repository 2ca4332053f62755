"""Release of a model for others to load: weights, tokenizer, model card, checksums, lineage, and the recipe
to reproduce it.

A release contains no rows and no local paths, and names people as `reviewer 1`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.aliases import current_kind
from ...config.load import dump
from ...config.load import load as read_recipe
from ...config.recipe import Evaluate, Files, Load, Problems, Recipe, Report, Stage, inputs, sources
from ...config.validate import MODELS
from ...files import SUMS, checksums
from ...text.prompt_format import PromptFormat
from ...types import LimbeckError
from ..dataset_rows import response_text, training_rows
from ..model_name import RELEASED, find_artifact
from ..run_folder import RECIPE, indexes
from ..store import Artifact, Store, digest_of, sync_below, write
from .card import card
from .licences import NOBODY_KNOWS, bind, terms
from .lineage import Lineage, lineage_of
from .propagate import LEARNING

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Released:
    """A released directory and notes for the user who made it: `Released(Path("out"), ("no GGUF: ...",))`."""

    folder: Path
    notes: tuple[str, ...]


def release(model: str, out: Path, runs: Path, name: str = "", gguf: str = "auto") -> Released:
    """Write a released directory `out`, atomically. `model` is a name that `find_artifact` accepts, `name`
    the name in the model card (by default that of the directory). `gguf` is a type of `limbeck export`,
    `none`, or `auto`, which writes a GGUF file unless the format cannot contain the model.

    Raises LimbeckError, with the clause and a remedy, if a licence forbids the release or the name does not
    begin as a licence demands.
    """
    artifact, store = find_artifact(model, runs)
    name = name or out.resolve().name
    if artifact.kind not in MODELS:
        raise LimbeckError(f"{model} is a {artifact.manifest['kind']} stage, which has no model to release")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LimbeckError(f"{out} is there already; choose another directory, or remove it")
    lineage = lineage_of(artifact, store)
    check_release(lineage, name)
    recipe = recipe_of(artifact, store)
    part = out.resolve().parent / f".{out.resolve().name}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(artifact.folder / "model", part)
    try:
        notes = _add_gguf(part, name, gguf)
        _add_licences(part, lineage)
        write(part / RECIPE, dump(recipe))
        _add_card(part, name, published_lineage(lineage), evaluations(artifact, store))
        write(part / SUMS, checksums(part))
        sync_below(part)
        if out.exists():
            out.rmdir()
        part.rename(out.resolve())
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Released(out, (*notes, *duties(lineage)))


# ---------------------------------------------------------------- licences


def check_release(lineage: Lineage, name: str) -> None:
    """Raise LimbeckError if a licence forbids handing on the model, or demands another beginning of its
    `name`."""
    for licence in lineage.licences:
        _refuse_forbidden(lineage, licence)
    for licence in lineage.licences:
        prefix = terms(licence).prefix
        if prefix and not re.sub(r"[-_ ]+", " ", name).startswith(prefix):
            clause = terms(licence).clause("prefix")
            better = f"{prefix.replace(' ', '-')}-{name}"
            raise LimbeckError(
                f"{name}: a model bound by {licence} must have a name that begins with {prefix!r} "
                f"({clause}); say --name {better}"
            )


def _refuse_forbidden(lineage: Lineage, licence: str) -> None:
    """Raise LimbeckError if the licence forbids the release and the user has claimed no exemption from it."""
    claimed = {right["licence"] for right in lineage.head.get("rights", [])}
    if terms(licence).release != "no" or licence in claimed:
        return
    stage = lineage.head["stage"]
    bound = [entry["stage"] for entry in lineage.entries.values() if licence in entry["licences"]]
    if terms(licence) is NOBODY_KNOWS:
        raise LimbeckError(
            f"{stage} cannot be released: nobody knows the terms {licence!r} of {bound[-1]}; "
            "declare its licence and run again"
        )
    clause = terms(licence).clause("release")
    raise LimbeckError(
        f"{stage} cannot be released: {licence}, which it has from {bound[-1]}, forbids that: {clause}; "
        "train it without"
    )


def duties(lineage: Lineage) -> list[str]:
    """Return the duties of the model's publisher: one line for each licence with duties, then the texts that
    must be shown."""
    lines = []
    for licence in lineage.licences:
        if terms(licence).duties:
            lines.append(f"{licence}: {'; '.join(terms(licence).duties)}")
    return lines + [f"show “{text}” where you present it" for text in bind(lineage.licences).display]


# ---------------------------------------------------------------- files


def _add_gguf(part: Path, name: str, kind: str) -> list[str]:
    """Write the GGUF file into the directory `part`. Return a note if the format cannot contain the model and
    `kind` is `auto`, else []."""
    if kind == "none":
        return []
    from ...model import gguf

    precision = "f16" if kind == "auto" else kind
    try:
        gguf.write(part, part / f"{name}-{precision}.gguf", precision)
    except LimbeckError as error:
        if kind != "auto":
            raise
        reason = str(error).replace(f"{part}/", "")
        return [f"no GGUF file: {reason}"]
    return []


def _add_licences(part: Path, lineage: Lineage) -> None:
    """Copy the licence files of the models from outside into the directory, and write a `NOTICE` with all
    licences."""
    for entry in lineage.entries.values():
        for path in _licence_files(entry):
            shutil.copyfile(path, part / f"{entry['stage']}-{path.name}")
    if not lineage.licences:
        return
    lines = ["This model is bound by"]
    for licence in lineage.licences:
        lines.append(f"  {licence}: {terms(licence).title}, {terms(licence).source}")
    lines.append("Its weights were changed by training.")
    write(part / "NOTICE", "\n".join(lines) + "\n")


def _licence_files(entry: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the licence files beside a model from outside that the lineage's `entry` describes."""
    path = entry["settings"].get("path")
    if entry["kind"] != "load" or not path or not Path(path).is_dir():
        return
    for pattern in LICENCE_FILES:
        for file in Path(path).glob(pattern):
            if file.is_file():
                yield file


def _add_card(part: Path, name: str, published: dict[str, Any], measured: list[dict[str, Any]]) -> None:
    """Write `lineage.json` and the model card. `published` is the published lineage, `measured` the
    evaluations."""
    write(part / RELEASED, json.dumps(published, indent=2, ensure_ascii=False) + "\n")
    ggufs = [path.name for path in part.glob("*.gguf")]
    prompt_format = PromptFormat.from_directory(part)
    write(part / "README.md", card(name, published, measured, ggufs, prompt_format))


def evaluations(artifact: Artifact, store: Store) -> list[dict[str, Any]]:
    """Return the contents of `evaluation.json` for each evaluation of exactly this model's weights, except
    those with a control, which change the model's responses."""
    measured = []
    for candidate in store.all():
        if candidate.kind != "evaluate":
            continue
        keys = [cited["key"] for cited in candidate.manifest["inputs"].values()]
        if artifact.manifest["key"] in keys:
            path = candidate.folder / "evaluation.json"
            measured.append(json.loads(path.read_text(encoding="utf-8")))
    return [evaluation for evaluation in measured if not evaluation.get("control")]


# ---------------------------------------------------------------- the published lineage


def published_lineage(lineage: Lineage) -> dict[str, Any]:
    """Return the lineage without private data: no names of people, no paths, and for the rows only their
    number and a digest."""
    aliases = _aliases(lineage)
    entries = {}
    for key, entry in lineage.entries.items():
        entries[key] = _published(entry, aliases)
        rows = _row_identities(lineage, key) if current_kind(entry["kind"]) in LEARNING else []
        if rows:
            entries[key]["rows"] = {"count": len(rows), "sha256": digest_of(rows)}
    return Lineage(lineage.root, entries).tell()


def _aliases(lineage: Lineage) -> dict[str, str]:
    """Return the public names `reviewer 1`, `reviewer 2`, … of the people who edited rows, by their real
    names."""
    editors: set[str] = set()
    for entry in lineage.entries.values():
        editors.update(entry["sources"].get("editors", []))
    people = sorted(name for name in editors if not name.startswith("policy: "))
    return {name: f"reviewer {number}" for number, name in enumerate(people, 1)}


def _published(entry: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return an entry of the lineage with public names of people, only the last component of paths, and no
    names of those who claimed exemptions."""
    settings = dict(entry["settings"])
    if "path" in settings:
        settings["path"] = Path(settings["path"]).name
    notes = dict(entry.get("notes") or {})
    if "reviewers" in notes:
        notes["reviewers"] = [aliases.get(name, name) for name in notes["reviewers"]]
    sources = {kind: list(names) for kind, names in entry["sources"].items()}
    if "editors" in sources:
        sources["editors"] = [aliases.get(name, name) for name in sources["editors"]]
    rights = []
    for right in entry.get("rights", []):
        rights.append({key: value for key, value in right.items() if key != "by"})
    return {**entry, "settings": settings, "notes": notes, "sources": sources, "rights": rights}


def _row_identities(lineage: Lineage, key: str) -> list[Any]:
    """Return [id, text, times per epoch] of each row that a stage was trained on. `key` is the key of the
    stage's artifact."""
    rows = training_rows(lineage.entries[key], lineage.input_folders(key))
    return [[row["id"], response_text(row), times] for _, row, times in rows]


# ---------------------------------------------------------------- the recipe


def recipe_of(artifact: Artifact, store: Store) -> Recipe:
    """Return the part of a run's recipe that the model depends on, and the evaluations, restricted to this
    model.

    Raises LimbeckError if no run has the artifact.
    """
    stage = artifact.manifest["stage"]
    runs = store.root.parent
    for run, stages in indexes(runs).items():
        path = runs / run / RECIPE
        if stages.get(stage) == artifact.folder.name and path.exists():
            return part_of(read_recipe(path), stage)
    raise LimbeckError(
        f"{artifact.folder.name}: no run in {runs} has it as its stage {stage}; run its recipe again first"
    )


def part_of(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with only the stages that the stage `name` depends on, the problems that they use,
    and the evaluations. Paths of files and models are reduced to their last component."""
    needed = _behind(recipe, name, set())
    stages: dict[str, Stage] = {}
    for cited, stage in recipe.stages.items():
        if isinstance(stage, Evaluate):  # kept, for its tests decide what decontamination leaves out
            stages[cited] = stage.model_copy(
                update={"models": [name], "forced": [], "retry": {}, "without_thought": None}
            )
        elif cited in needed and not isinstance(stage, Report):
            stages[cited] = _without_folder(stage) if isinstance(stage, Load) else stage
    drawn = _problem_names(stages)
    problems: dict[str, Problems] = {}
    for cited, source in recipe.problems.items():
        if cited in drawn or _policy_may_use(source, stages):
            problems[cited] = _without_folder(source) if isinstance(source, Files) else source
    return recipe.model_copy(update={"stages": stages, "problems": problems})


def _without_folder(config: Any) -> Any:
    """Return a copy of the settings with `path` reduced to its last component."""
    return config.model_copy(update={"path": Path(config.path).name})


def _problem_names(stages: Mapping[str, Stage]) -> set[str]:
    """Return the names of the problem sources, `screen` stages and teachers that the stages name."""
    names: set[str] = set()
    for stage in stages.values():
        names.update(sources(stage))
        names.update(getattr(stage, "teachers", ()))
    return names


def _behind(recipe: Recipe, name: str, visited: set[str]) -> set[str]:
    """Add the stage `name` and all stages that it depends on to `visited`, and return `visited`."""
    if name in visited:
        return visited
    visited.add(name)
    stage = recipe.stages[name]
    screenings = [source for source in sources(stage) if source in recipe.stages]
    for cited in [*inputs(stage), *screenings]:
        _behind(recipe, cited, visited)
    return visited


def _policy_may_use(problems: Problems, stages: Mapping[str, Stage]) -> bool:
    """Return True for a miniature problem source (a small synthetic task) in a recipe with a curate stage.
    The stage's policy may translate thoughts with that source, which is therefore part of the stage's key."""
    return problems.source == "miniature" and any(stage.kind == "curate" for stage in stages.values())
