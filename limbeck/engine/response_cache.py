"""A disk cache of the responses of endpoints, so that no response is paid for twice. Each response is one
JSON file, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..files import atomic_write


class ResponseCache:
    """Responses stored in `folder` under a hash of everything that determines them; several processes may
    share the folder.

    If a process is killed, the requests that it is waiting for are lost, but no response that has arrived.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def key(request: Any) -> str:
        """Return the key of a response: the SHA-256 hash of `request`, a JSON value, with its object keys
        sorted."""
        text = json.dumps(request, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the response stored under `key`, or None if there is no file or the file is not valid
        JSON."""
        try:
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def put(self, key: str, response: dict[str, Any]) -> None:
        """Store a response under `key`: write a temporary file, flush it to disk, and rename it to its final
        name."""
        with atomic_write(self._path(key), "w") as file:
            json.dump(response, file, ensure_ascii=False)

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Hold a lock on `key`, across threads and processes, inside the `with` block. The first to hold it
        requests the response; the others wait and then find the response in the cache."""
        path = self._path(key).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
            path.unlink(
                missing_ok=True
            )  # a waiting process gets a lock on the deleted file: the response is there

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
