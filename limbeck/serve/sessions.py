"""Who is at the page: a name that a browser keeps, signed by us and worth nothing once the key has changed."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from itsdangerous import BadData, URLSafeTimedSerializer

COOKIE = "limbeck"
LASTS = 90 * 86400  # seconds


@dataclass(frozen=True)
class Person:
    """`Person("Mei", "9f2c…")`: the name reviews and votes are signed with, and one browser's own number."""

    name: str
    id: str


class Sessions:
    """Opens and reads session cookies. The secret lies beside the studio's own files, for its owner's eyes."""

    def __init__(self, folder: Path, key: str | None):
        salt = hashlib.sha256((key or "").encode()).hexdigest()
        self._signer = URLSafeTimedSerializer(secret(folder), salt=f"limbeck-session-{salt}")

    def open(self, name: str) -> str:
        """A cookie for somebody of this name."""
        return self._signer.dumps([name, secrets.token_hex(8)])

    def read(self, cookie: str) -> Person | None:
        """Whose cookie this is; None if we did not sign it, or too long ago."""
        try:
            return Person(*self._signer.loads(cookie, max_age=LASTS)) if cookie else None
        except (BadData, TypeError):
            return None


def secret(folder: Path) -> str:
    """32 random bytes, drawn once. The file appears whole or not at all: a kill never leaves an empty secret behind."""
    path = folder / "secret"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        drawn, name = tempfile.mkstemp(dir=folder)  # readable by its owner alone
        with os.fdopen(drawn, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another server was quicker: its secret is everybody's
            os.link(name, path)
        os.unlink(name)
    return path.read_text()
