"""A disk cache of endpoints' responses, so that no request is paid for twice: one file per response, written
atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


class ResponseCache:
    """Responses under the hash of everything that decides them; processes may share the folder.

    A killed process loses the requests in flight and no response that has arrived.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def key(request: Any) -> str:
        """SHA-256 of a JSON value, its keys sorted."""
        text = json.dumps(request, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """The response, or None if there is none or its file is broken."""
        try:
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def put(self, key: str, response: dict[str, Any]) -> None:
        """Write a response to a file beside its place, flush it to disk, and rename it."""
        path = self._path(key)
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(response, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Lock a key across threads and processes, so that one of them requests it and the others find the
        response."""
        path = self._path(key).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
            path.unlink(
                missing_ok=True
            )  # a waiting process gets a lock on the deleted file: the response is there

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
