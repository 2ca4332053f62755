"""Files that are either complete or absent: written beside, flushed to disk, renamed into place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


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
