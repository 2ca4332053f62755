"""What endpoints answered, on disk, so that nothing is asked twice: one file a response, whole or not
there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


class Responses:
    """Responses by the hash of everything that decides them; processes may share the folder.

    A kill loses the requests that are on their way, and nothing that has arrived.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def key(request: Any) -> str:
        """SHA-256 of a JSON value, its keys sorted."""
        return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """The response, or None where there is none that can be read."""
        try:
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def put(self, key: str, response: dict[str, Any]) -> None:
        """Write beside, force to disk, rename."""
        path = self._path(key)
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(response, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Whoever asks for this key, here or in another process, asks alone; the others find the response."""
        path = self._path(key).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
            path.unlink(missing_ok=True)  # who waited for it holds a lock on nothing, and finds the response

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
