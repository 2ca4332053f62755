"""Sessions of people, stored as a person's name in a signed cookie.

A cookie becomes invalid when the server's key changes.
"""

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
MAX_AGE_SECONDS = 90 * 86400  # seconds


@dataclass(frozen=True)
class Person:
    """A person's name, which signs reviews and votes, and a random id of the browser that signed in.

    `Person("Mei", "9f2c…")`
    """

    name: str
    id: str


class Sessions:
    """Signs and verifies the cookies of sessions.

    The secret for the signatures is a file in `folder` that only its owner can read. `key` is the server's
    key; with another key, all earlier cookies are invalid.
    """

    def __init__(self, folder: Path, key: str | None):
        salt = hashlib.sha256((key or "").encode()).hexdigest()
        self._signer = URLSafeTimedSerializer(secret(folder), salt=f"limbeck-session-{salt}")

    def open(self, name: str) -> str:
        """Return the cookie of a new session for a person of this name."""
        return self._signer.dumps([name, secrets.token_hex(8)])

    def read(self, cookie: str) -> Person | None:
        """Return the person named in a cookie; None if its signature is invalid or it has expired."""
        if not cookie:
            return None
        try:
            name, browser = self._signer.loads(cookie, max_age=MAX_AGE_SECONDS)
        except (BadData, TypeError, ValueError):
            return None
        return Person(name, browser)


def secret(folder: Path) -> str:
    """Return the secret of a folder: 32 random bytes as hexadecimal digits, drawn at the first call.

    The file is linked into place once it is complete, so a killed server never leaves an empty secret behind.
    """
    path = folder / "secret"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return path.read_text()
    descriptor, temporary = tempfile.mkstemp(dir=folder)  # readable by its owner alone
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):  # another server was faster: its secret is used by both
        os.link(temporary, path)
    os.unlink(temporary)
    return path.read_text()
