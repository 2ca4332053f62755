"""The commands that look after the artifacts on disk: gc deletes unused ones, verify checks their hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import RUNS, Home, open_store

if TYPE_CHECKING:
    from ..pipeline.store import Store

app = typer.Typer()

DAMAGED = 4  # exit code


@app.command()
def gc(runs: Home = RUNS, yes: Annotated[bool, typer.Option("--yes", help="really delete")] = False) -> None:
    """Delete artifacts that no run in the folder uses any more, and what killed stages left."""
    from ..types import Resumable

    store = open_store(runs)
    folders = _unused(store, runs)
    for folder in folders:
        try:
            with store.lock(folder, patience=0):
                size = store.remove(folder) if yes else store.size(folder)
        except Resumable:
            print(f"kept {folder}: a stage is at work in it")
            continue
        print(f"{'deleted' if yes else 'would delete'} {folder} ({size / 1e6:.1f} MB)")
    if not folders:
        print("nothing to delete")


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
def verify(runs: Home = RUNS) -> None:
    """Hash every artifact again and compare with its manifest."""
    damaged = False
    for artifact, faults in open_store(runs).verify():
        print(f"{artifact.folder.name}: {'; '.join(faults) or 'as it was'}")
        damaged = damaged or bool(faults)
    if damaged:
        raise typer.Exit(DAMAGED)
