"""Files that are either complete or absent: written beside, flushed to disk, renamed into place; and their
checksums, as `sha256sum` prints them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

SUMS = "SHA256SUMS"  # the name of a file of checksums in the directory of the files


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file in `mode` ("wb", or "w" for UTF-8 text) that replaces `path` at the end of the `with`
    block.

    After an exception, a kill or a full disk the old file, if any, is unchanged. The temporary file bears the
    process id, since two processes may write the same path, and ends in `.partial`, by which the store finds
    leftovers."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(partial, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush a file or a directory to disk (fsync). A rename is durable only after its directory was
    flushed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> str:
    """Return the SHA-256 of every file below a folder, a line each, with the file's path in the folder."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return "".join(f"{digest_file(folder / file)}  {file}\n" for file in files)


def compare_checksums(folder: Path, sums: str) -> list[str]:
    """Return a message for each file that differs from its line in `sums`, [] if all agree."""
    faults = []
    for line in sums.splitlines():
        checksum, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif digest_file(path) != checksum:
            faults.append(f"{path} has changed")
    return faults
