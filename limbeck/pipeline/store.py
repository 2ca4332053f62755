"""Artifacts on disk, addressed by what made them. A folder with a manifest is complete; one without is not.

    store/rl-3fa9c1d07b52/manifest.json ...      an artifact
    store/.partial/rl-3fa9c1d07b52/ ...          a stage at work, or one that was killed
    store/.queues/8c41.../                       rows that wait for people
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..record import TIMING
from ..types import Corrupted, LimbeckError, Resumable

MANIFEST = "manifest.json"
SCHEMA = 1
UNREPEATABLE = {TIMING}  # seconds differ from run to run and so stay out of an artifact's digest


@dataclass(frozen=True)
class Artifact:
    """A complete folder: `Artifact(Path("store/rl-3fa9c1d07b52"), {"kind": "rl", ...})`."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        return self.manifest["digest"]


class Store:
    """One folder of artifacts; several runs and several processes may share it."""

    def __init__(self, root: Path):
        self.root = root
        (root / ".partial").mkdir(parents=True, exist_ok=True)

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact of this key, if it is complete."""
        return self.open(self.root / _name(kind, key))

    def open(self, folder: Path) -> Artifact | None:
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            return Artifact(folder, json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            raise Corrupted(f"{path}: not valid JSON; remove {folder} and run again, it is made anew") from None

    def all(self) -> Iterator[Artifact]:
        for folder in sorted(self.root.iterdir()):
            artifact = self.open(folder) if folder.is_dir() and not folder.name.startswith(".") else None
            if artifact:
                yield artifact

    def partial(self, kind: str, key: str) -> Path:
        """Where a stage works until it is done; what a killed one left is still there."""
        folder = self.root / ".partial" / _name(kind, key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def lock(self, folder: Path) -> FileLock:
        """At most one process works in a partial folder; the operating system frees it when that one dies."""
        lock = FileLock(folder.with_name(folder.name + ".lock"))
        try:
            lock.acquire(timeout=10)
        except Timeout:
            raise Resumable(f"another process works on {folder.name}; wait for it, or stop it, and run again") from None
        return lock

    def finish(self, folder: Path, manifest: dict[str, Any]) -> Artifact:
        """Hash and sync every file, write the manifest last, rename into place, sync the parents."""
        outputs = {p.relative_to(folder).as_posix(): _describe(p) for p in _files(folder)}
        stable = {name: entry for name, entry in outputs.items() if Path(name).name not in UNREPEATABLE}
        manifest = {"schema": SCHEMA, **manifest, "outputs": outputs, "digest": digest_of(stable)}
        for path in _files(folder):
            _sync(path)
        write(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        _sync(folder)
        place = self.root / _name(manifest["kind"], manifest["key"])
        if place.exists():  # a folder without a manifest: quarantined, never deleted
            place.rename(place.with_name(f".bad-{place.name}-{os.getpid()}"))
        folder.rename(place)
        _sync(self.root)
        folder.with_name(folder.name + ".lock").unlink(missing_ok=True)
        return Artifact(place, manifest)

    def verify(self) -> Iterator[tuple[Artifact, list[str]]]:
        """Every artifact, with the files that are not what the manifest says."""
        for artifact in self.all():
            wrong = []
            for name, entry in artifact.manifest["outputs"].items():
                path = artifact.folder / name
                if not path.exists():
                    wrong.append(f"{path} is missing")
                elif _describe(path) != entry:
                    wrong.append(f"{path} has changed")
            yield artifact, wrong

    def resolve(self, name: str) -> Artifact:
        """An artifact by (the beginning of) its folder's name or key."""
        found = [a for a in self.all() if a.folder.name.startswith(name) or a.manifest["key"].startswith(name)]
        if len(found) != 1:
            what = "no artifact" if not found else f"{len(found)} artifacts"
            raise LimbeckError(f"{name}: {what} of that name in {self.root}; `limbeck show` lists them")
        return found[0]

    def remove(self, folder: Path) -> int:
        """Delete a folder; returns the bytes that it held."""
        size = sum(p.stat().st_size for p in _files(folder))
        shutil.rmtree(folder)
        return size

    def leftovers(self) -> list[Path]:
        """Partial and quarantined folders."""
        return [p for p in [*(self.root / ".partial").iterdir(), *self.root.glob(".bad-*")] if p.is_dir()]


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, text: str) -> None:
    """A text file, whole and on disk, or not there."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def out_of_space(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _name(kind: str, key: str) -> str:
    return f"{kind}-{key[:16]}"


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": digest_file(path), "bytes": path.stat().st_size}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _sync(path: Path) -> None:
    """A rename is durable only with the directory that names it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
