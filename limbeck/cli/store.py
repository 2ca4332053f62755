"""The commands that look after the artifacts on disk: gc deletes unused ones, verify checks their hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import compare_checksums
from ..model.footprint import size_text
from .options import MODEL, RUNS, Home, open_store, usage_error

if TYPE_CHECKING:
    from ..pipeline.store import Store

app = typer.Typer()

DAMAGED = 4  # exit code


@app.command()
def gc(
    runs: Home = RUNS,
    yes: Annotated[bool, typer.Option("--yes", help="really delete")] = False,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints",
            help="also the final checkpoints that stages could be continued from with more steps",
        ),
    ] = False,
) -> None:
    """Delete artifacts that no run in the folder uses any more, and what killed stages left.

    Without --yes it only tells what it would delete. For instance: `limbeck gc --yes`
    """
    from ..types import Resumable

    store = open_store(runs)
    sizes: list[int] = []
    folders = _unused(store, runs)
    for folder in folders:
        try:
            with store.lock(folder, patience=0):
                size = store.remove(folder) if yes else store.size(folder)
        except Resumable:
            print(f"kept {folder}: a stage is at work in it")
            continue
        sizes.append(size)
        print(f"{'deleted' if yes else 'would delete'} {folder} ({size_text(size)})")
    freed = _free_checkpoints(store, {folder.name for folder in folders}, checkpoints, yes)
    if not folders and not freed:
        print("nothing to delete")
    if sizes or freed:
        parts = f"{_count(len(sizes), 'folder')} and {_count(len(freed), 'checkpoint')}"
        remedy = "" if yes else "; --yes deletes them"
        print(f"{'freed' if yes else 'would free'} {size_text(sum(sizes + freed))} in {parts}{remedy}")


def _count(number: int, noun: str) -> str:
    """Return a number with its noun: `2 folders`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _free_checkpoints(store: Store, unused: set[str], also_used: bool, yes: bool) -> list[int]:
    """Delete the final checkpoints of the artifacts named `unused` and of those that are gone and, if
    `also_used`, all others; say what this means for their stages. Return their sizes in bytes.

    Without `yes`, only print what would be deleted.
    """
    freed = []
    kept = []
    for path, artifact in store.checkpoints():
        used = artifact is not None and path.stem not in unused
        size = path.stat().st_size
        if used and not also_used:
            kept.append(size)
            continue
        freed.append(size)
        if yes:
            path.unlink()
        loss = f": {artifact.manifest['stage']} cannot be continued with more steps then" if used else ""
        print(f"{'deleted' if yes else 'would delete'} {path} ({size_text(size)}){loss}")
    if kept:
        plural = "s" if len(kept) > 1 else ""
        print(
            f"kept {len(kept)} final checkpoint{plural} ({size_text(sum(kept))}), from which stages can be "
            "continued with more steps; --checkpoints deletes them too"
        )
    return freed


def _unused(store: Store, runs: Path) -> list[Path]:
    """Return the folders that may be deleted: artifacts that no run in `runs` uses, and what killed stages
    left behind.
    """
    used: set[str] = set()
    for index in runs.glob("*/stages.json"):
        used.update(json.loads(index.read_text()).values())
    folders = [artifact.folder for artifact in store.all()]
    return [folder for folder in folders if folder.name not in used] + store.leftovers()


@app.command()
def verify(
    model: Annotated[
        str, typer.Argument(help=f"{MODEL}; or a released directory; none verifies all artifacts")
    ] = "",
    runs: Home = RUNS,
) -> None:
    """Hash artifacts again and compare them with their manifests, or a released directory with its checksums.

    For instance: `limbeck verify`, `limbeck verify quickstart/r1`
    """
    from ..pipeline.model_name import find

    if not model:
        results = [(artifact.folder.name, faults) for artifact, faults in open_store(runs).verify()]
    else:
        found = find(model, runs)
        if found.artifact:
            results = [(found.artifact.folder.name, found.store.compare(found.artifact))]
        else:
            results = [(str(found.path), compare_checksums(found.path, _checksums(found.path)))]
    damaged = False
    for name, faults in results:
        print(f"{name}: {'; '.join(faults) or 'as it was'}")
        damaged = damaged or bool(faults)
    if damaged:
        raise typer.Exit(DAMAGED)


def _checksums(path: Path) -> str:
    """Return the checksums of a released directory, or of one that `limbeck pull` fetched.

    Raises a usage error for any other model.
    """
    from ..files import SUMS
    from ..model.pull import checksums_of

    for sums in (path / SUMS, checksums_of(path)):
        if sums.is_file():
            return sums.read_text(encoding="utf-8")
    raise usage_error(
        f"{path} has no checksums to compare with; those have artifacts, released directories and models "
        "fetched by `limbeck pull`"
    )
