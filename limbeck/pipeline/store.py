"""The store: finished stage results (artifacts) on disk, in folders named after the hash of their inputs. A
folder with a manifest is complete; a folder without one is not.

store/rl-3fa9c1d07b52/manifest.json ...      an artifact
store/.partial/rl-3fa9c1d07b52/ ...          a stage that is running, or that was killed
store/.partial/rl-3fa9c1d07b52.lock          held by the process that writes into that folder
store/.bad-rl-3fa9c1d07b52-1/ ...            a folder in an artifact's place that had no manifest
store/.checkpoints/rl-3fa9c1d07b52.pt        the final checkpoint of a stage that a longer one can continue
store/.queues/8c41.../                       rows that people review
store/.responses/4d/4d09....json             cached responses of endpoints, never requested or paid for twice
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config.aliases import current_kind, stored_kind
from ..files import atomic_write, digest_file, sync
from ..run_log import TIMING
from ..types import Corrupted, Resumable

MANIFEST = "manifest.json"
RESPONSES = ".responses"
CHECKPOINTS = ".checkpoints"
SCHEMA = 1  # version of the manifest's layout
UNREPEATABLE = {TIMING}  # files whose content differs from run to run and stays out of an artifact's digest
OUTCOME = "outcome.json"  # the stage's return value: a partial folder that has it only needs `finish`
LOCK_TIMEOUT_SECONDS = 10.0  # seconds to wait for another process in the same folder
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Artifact:
    """The complete result of a stage: `Artifact(Path("store/rl-3fa9c1d07b52"), {"kind": "rl", ...})`."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """The kind of the stage that made the artifact, such as `rl`."""
        return current_kind(self.manifest["kind"])

    @property
    def digest(self) -> str:
        """The SHA-256 of the artifact's files, without those that differ between identical runs (timing)."""
        return self.manifest["digest"]

    @property
    def weights(self) -> dict[str, str]:
        """The SHA-256 of each file of the model's weights, by name; {} for an artifact without a model."""
        files = self.manifest["outputs"]
        names = [name for name in files if name.startswith("model/") and name.endswith(".safetensors")]
        return {name: files[name]["sha256"] for name in names}


class Store:
    """One folder of artifacts, which several runs and processes may share."""

    def __init__(self, root: Path):
        self.root = root

    # ------------------------------------------------------------ reading

    def find(self, kind: str, key: str) -> Artifact | None:
        """Return the artifact of a stage's kind and key; None if it does not exist or is not complete."""
        return self.open(self.root / _name(kind, key))

    def open(self, folder: Path) -> Artifact | None:
        """Return the artifact in a folder; None if it has no manifest. Raises Corrupted if the manifest is
        not valid JSON."""
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
        """Yield all complete artifacts, sorted by the name of their folder."""
        for folder in sorted(self.root.glob("*")):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            artifact = self.open(folder)
            if artifact:
                yield artifact

    def verify(self) -> Iterator[tuple[Artifact, list[str]]]:
        """Yield every artifact with the result of `compare`."""
        for artifact in self.all():
            yield artifact, self.compare(artifact)

    def compare(self, artifact: Artifact) -> list[str]:
        """Return a message for each file of an artifact that differs from the manifest, [] if all agree."""
        outputs = artifact.manifest["outputs"]
        faults = []
        if _digest_of_outputs(outputs) != artifact.digest:
            faults.append(f"{artifact.folder / MANIFEST} has changed")
        for name, description in outputs.items():
            path = artifact.folder / name
            if not path.exists():
                faults.append(f"{path} is missing")
            elif _describe(path) != description:
                faults.append(f"{path} has changed")
        return faults

    def checkpoint(self, folder: Path) -> Path:
        """Return the path of the final checkpoint of the stage that made, or makes, an artifact in a
        folder. The file exists if a longer stage can be continued from it and `gc` has not deleted it."""
        return self.root / CHECKPOINTS / f"{folder.name}.pt"

    def checkpoints(self) -> Iterator[tuple[Path, Artifact | None]]:
        """Yield the final checkpoints, each with the artifact of its stage; None if that is gone. Those of
        stages whose artifact is about to be stored are left out."""
        for path in sorted((self.root / CHECKPOINTS).glob("*.pt")):
            artifact = self.open(self.root / path.stem)
            if artifact or not (self.root / ".partial" / path.stem).exists():
                yield path, artifact

    def size(self, folder: Path) -> int:
        """Return the total size, in bytes, of the files in a folder, without the manifest."""
        return sum(path.stat().st_size for path in _files(folder))

    def leftovers(self) -> list[Path]:
        """Return the partial folders (of running or killed stages) and the `.bad-` folders."""
        candidates = [*self.root.glob(".partial/*"), *self.root.glob(".bad-*")]
        return sorted(path for path in candidates if path.is_dir())

    # ------------------------------------------------------------ writing

    def partial(self, kind: str, key: str) -> Path:
        """Return the folder that a stage writes into while it runs, and create it if needed. The files of a
        killed earlier attempt are still in it."""
        folder = self.root / ".partial" / _name(kind, key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def lock(self, folder: Path, patience: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
        """Hold the lock of a partial folder, so that only one process at a time writes into it. The operating
        system frees the lock when the process dies.

        Raises Resumable if another process still holds the lock after `patience` seconds.
        """
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
        """Turn a stage's partial folder into an artifact: hash and sync every file, write the manifest last,
        and rename the folder.

        If another process finished the same key first, return its artifact, which has the same content.
        """
        with self.lock(folder):
            existing = self.find(manifest["kind"], manifest["key"])
            return existing or self._finish(folder, manifest)

    def _finish(self, folder: Path, manifest: dict[str, Any]) -> Artifact:
        sweep(folder)
        outputs = {path.relative_to(folder).as_posix(): _describe(path) for path in _files(folder)}
        manifest = {"schema": SCHEMA, **manifest, "outputs": outputs, "digest": _digest_of_outputs(outputs)}
        sync_below(folder)
        _write_manifest(folder, manifest)
        sync(folder)
        place = self.root / _name(manifest["kind"], manifest["key"])
        if place.exists():  # a folder without a manifest: quarantined, never deleted
            place.rename(self._unused(f".bad-{place.name}"))
        folder.rename(place)
        (place / OUTCOME).unlink(missing_ok=True)  # no longer needed; if it stays, it harms nothing
        sync(self.root)
        sync(folder.parent)
        return Artifact(place, manifest)

    def amend(self, artifact: Artifact, news: dict[str, Any]) -> None:
        """Add the entries `news` to an artifact's manifest. The artifact's files and its digest do not
        change."""
        artifact.manifest.update(news)
        _write_manifest(artifact.folder, artifact.manifest)

    def _unused(self, name: str) -> Path:
        """Return the first path `name-1`, `name-2`, ... in the store that does not exist."""
        for i in itertools.count(1):
            path = self.root / f"{name}-{i}"
            if not path.exists():
                return path

    def remove(self, folder: Path) -> int:
        """Delete a folder; return its size in bytes, without the manifest."""
        size = self.size(folder)
        shutil.rmtree(folder)
        return size


def digest_of(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of a JSON value with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, text: str) -> None:
    """Write a text file atomically: afterwards it is complete and on disk; after an error or a crash the old
    file, if any, is unchanged."""
    with atomic_write(path, "w") as file:
        file.write(text)


def sweep(folder: Path) -> None:
    """Delete the incomplete `*.partial` files that killed processes left in a folder."""
    for torn in folder.rglob("*.partial"):
        torn.unlink()


def sync_below(folder: Path) -> None:
    """Flush all files and directories in a folder, and the folder itself, to disk (fsync)."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def out_of_space(error: BaseException | None) -> bool:
    """Return True if a full disk caused the error.

    The chained exceptions are searched too, because torch raises its own error after the system's. Rust
    libraries only mention the error number in the message.
    """
    while error:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(f"(os error {number})" in str(error) for number in FULL):
            return True
        error = error.__context__
    return False


def _name(kind: str, key: str) -> str:
    """Return the folder name of an artifact: its kind and the first 16 digits of its key."""
    return f"{stored_kind(kind)}-{key[:16]}"


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _describe(path: Path) -> dict[str, Any]:
    """Return the SHA-256 and the size in bytes of a file, as the manifest lists them."""
    return {"sha256": digest_file(path), "bytes": path.stat().st_size}


def _digest_of_outputs(outputs: dict[str, Any]) -> str:
    """Return an artifact's digest from its manifest's list of files."""
    repeatable = {name: entry for name, entry in outputs.items() if Path(name).name not in UNREPEATABLE}
    return digest_of(repeatable)


def _files(folder: Path) -> list[Path]:
    """Return the files that a stage made in a folder, sorted, without the manifest and `outcome.json`."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.name not in (MANIFEST, OUTCOME))
