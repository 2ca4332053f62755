"""Files that are whole or not there: written beside, synced, renamed into place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write to, open in `mode` ("wb", or "w" for UTF-8 text), that replaces `path` at the end of
    the block.

    A kill, a full disk or an exception leaves the old file as it was. The partial file bears the process id,
    since two processes may write the same path, and ends in `.partial`, which the store sweeps away."""
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
    sync_directory(path.parent)


def sync_directory(folder: Path) -> None:
    """Force the names in a directory to disk, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
