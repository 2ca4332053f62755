"""Artifacts on disk, addressed by what made them. A folder with a manifest is complete; one without is not.

store/rl-3fa9c1d07b52/manifest.json ...      an artifact
store/.partial/rl-3fa9c1d07b52/ ...          a stage at work, or one that was killed
store/.partial/rl-3fa9c1d07b52.lock          held by whoever writes into it
store/.bad-rl-3fa9c1d07b52-1/ ...            was in an artifact's place without being one
store/.queues/8c41.../                       rows that wait for people
store/.responses/4d/4d09....json             what endpoints answered: paid for once, never asked again
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config.aliases import current_kind, stored_kind
from ..run_log import TIMING
from ..types import Corrupted, LimbeckError, Resumable

MANIFEST, RESPONSES = "manifest.json", ".responses"
SCHEMA = 1
UNREPEATABLE = {TIMING}  # seconds differ from run to run and so stay out of an artifact's digest
OUTCOME = (
    "outcome.json"  # what a stage returned: in a partial folder it says that only `finish` is left to do
)
PATIENCE = 10.0  # seconds to wait for a process that works in the same folder; an orphan ends within one
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Artifact:
    """A complete folder: `Artifact(Path("store/rl-3fa9c1d07b52"), {"kind": "rl", ...})`."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """The stage kind in today's word: `dpo`, where the manifest has `preference`."""
        return current_kind(self.manifest["kind"])

    @property
    def digest(self) -> str:
        return self.manifest["digest"]


class Store:
    """One folder of artifacts; several runs and several processes may share it."""

    def __init__(self, root: Path):
        self.root = root

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
            raise Corrupted(
                f"{path}: not valid JSON; remove {folder} and run again, it is made anew"
            ) from None

    def all(self) -> Iterator[Artifact]:
        for folder in sorted(self.root.glob("*")):
            artifact = self.open(folder) if folder.is_dir() and not folder.name.startswith(".") else None
            if artifact:
                yield artifact

    def partial(self, kind: str, key: str) -> Path:
        """Where a stage works until it is done; what a killed one left is still there."""
        folder = self.root / ".partial" / _name(kind, key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def lock(self, folder: Path, patience: float = PATIENCE) -> Iterator[None]:
        """At most one process works in a partial folder; the operating system frees it when that one dies."""
        (self.root / ".partial").mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".partial" / f"{folder.name}.lock")
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise Resumable(
                f"another process works on {folder.name}; wait for it, or stop it, and run again"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def finish(self, folder: Path, manifest: dict[str, Any]) -> Artifact:
        """Hash and sync every file, write the manifest last, rename into place, sync the parents.

        Where another process was faster, its artifact is the one: the same key, the same bytes.
        """
        with self.lock(folder):
            return self.find(manifest["kind"], manifest["key"]) or self._finish(folder, manifest)

    def _finish(self, folder: Path, manifest: dict[str, Any]) -> Artifact:
        sweep(folder)
        outputs = {p.relative_to(folder).as_posix(): _describe(p) for p in _files(folder)}
        manifest = {"schema": SCHEMA, **manifest, "outputs": outputs, "digest": _digest_of_outputs(outputs)}
        sync_below(folder)
        write(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        _sync(folder)
        place = self.root / _name(manifest["kind"], manifest["key"])
        if place.exists():  # a folder without a manifest: quarantined, never deleted
            place.rename(self._unused(f".bad-{place.name}"))
        folder.rename(place)
        (place / OUTCOME).unlink(missing_ok=True)  # it has done its duty; should it stay, it harms nobody
        _sync(self.root)
        _sync(folder.parent)
        return Artifact(place, manifest)

    def amend(self, artifact: Artifact, news: dict[str, Any]) -> None:
        """Say more in a manifest; what the artifact holds, and so its digest, stays."""
        artifact.manifest.update(news)
        write(artifact.folder / MANIFEST, json.dumps(artifact.manifest, indent=2, ensure_ascii=False) + "\n")

    def _unused(self, name: str) -> Path:
        return next(p for i in itertools.count(1) if not (p := self.root / f"{name}-{i}").exists())

    def verify(self) -> Iterator[tuple[Artifact, list[str]]]:
        """Every artifact, with the files that are not what the manifest says."""
        for artifact in self.all():
            wrong, outputs = [], artifact.manifest["outputs"]
            if _digest_of_outputs(outputs) != artifact.digest:
                wrong.append(f"{artifact.folder / MANIFEST} has changed")
            for name, entry in outputs.items():
                path = artifact.folder / name
                if not path.exists():
                    wrong.append(f"{path} is missing")
                elif _describe(path) != entry:
                    wrong.append(f"{path} has changed")
            yield artifact, wrong

    def resolve(self, name: str) -> Artifact:
        """An artifact by (the beginning of) its folder's name or key."""
        found = [
            a for a in self.all() if a.folder.name.startswith(name) or a.manifest["key"].startswith(name)
        ]
        if len(found) != 1:
            what = "no artifact" if not found else f"{len(found)} artifacts"
            raise LimbeckError(f"{name}: {what} of that name in {self.root}; `limbeck show` lists them")
        return found[0]

    def remove(self, folder: Path) -> int:
        """Delete a folder; returns the bytes that it held."""
        size = self.size(folder)
        shutil.rmtree(folder)
        return size

    def size(self, folder: Path) -> int:
        return sum(p.stat().st_size for p in _files(folder))

    def leftovers(self) -> list[Path]:
        """Partial and quarantined folders."""
        return sorted(p for p in [*self.root.glob(".partial/*"), *self.root.glob(".bad-*")] if p.is_dir())


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, text: str) -> None:
    """A text file, whole and on disk, or not there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two runs may share a run's folder
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Remove what kills left of files being written."""
    for torn in folder.rglob("*.partial"):
        torn.unlink()


def sync_below(folder: Path) -> None:
    """Force all files of a folder to disk, and the directories that name them."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def out_of_space(error: BaseException | None) -> bool:
    """torch buries the system's error under one of its own, and Rust libraries leave its number in the text."""
    while error:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(f"(os error {number})" in str(error) for number in FULL):
            return True
        error = error.__context__
    return False


def _name(kind: str, key: str) -> str:
    return f"{stored_kind(kind)}-{key[:16]}"


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": digest_file(path), "bytes": path.stat().st_size}


def _digest_of_outputs(outputs: dict[str, Any]) -> str:
    return digest_of({name: entry for name, entry in outputs.items() if Path(name).name not in UNREPEATABLE})


def _files(folder: Path) -> list[Path]:
    """The files that a stage made."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, OUTCOME))


def _sync(path: Path) -> None:
    """A rename is durable only with the directory that names it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
