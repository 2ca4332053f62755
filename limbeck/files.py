"""Writing files that are always complete: a file is written under another name, forced to disk, and renamed
to its final name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file to write, in a `with` block; at the end of the block the new file replaces `path`. `mode`
    is "wb", or "w" for UTF-8 text.

    A kill, a full disk or an exception leaves the old file as it was. The partial file has the process id in
    its name, since two processes may write the same path, and ends in `.partial`; the store deletes such
    files that were left behind."""
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
    """Force the entries of a directory to disk, so that a rename in it is not lost in a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
