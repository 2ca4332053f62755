"""Where the studio keeps what people did: one SQLite file a page, on disk before anybody is told that it is saved."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class SQLiteStore:
    """`SQLiteStore(path, schema)`: `schema[n]` takes a file of version n to n + 1, and is never edited once released."""

    def __init__(self, path: Path, schema: Sequence[str]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.open() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            for number, step in enumerate(schema[version:], version + 1):
                for statement in filter(str.strip, step.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on disk after the block, or nothing is."""
        db = sqlite3.connect(self.path, timeout=20.0, isolation_level=None)
        db.row_factory = sqlite3.Row
        try:
            db.execute("PRAGMA synchronous = FULL")  # a power cut loses nothing that was acknowledged
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        finally:
            db.close()
