"""The studio's storage: SQLite files with versioned schemas and durable transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOCK_TIMEOUT_SECONDS = 20.0  # seconds that a transaction waits for another one


class SQLiteStore:
    """A SQLite file: `SQLiteStore(path, schema)`.

    `schema[n]` migrates a file of version n to n + 1; a released migration never changes.
    """

    def __init__(self, path: Path, schema: Sequence[str]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.open() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            for number, migration in enumerate(schema[version:], version + 1):
                for statement in filter(str.strip, migration.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """One transaction: committed to disk at the end of the block, rolled back on an error."""
        db = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_SECONDS, isolation_level=None)
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
