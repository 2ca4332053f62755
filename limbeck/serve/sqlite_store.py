"""The storage of the studio: SQLite files with versioned schemas and durable transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOCK_TIMEOUT_SECONDS = 20.0  # seconds that a transaction waits for another one


class SQLiteStore:
    """A SQLite file, created or migrated to the newest version of its schema when it is opened.

    `schema[n]` has the SQL statements, separated by semicolons, that migrate a file of version n to version n
    + 1. A released migration must never be changed.
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
        """Open a connection for one transaction, as a context manager.

        The transaction is committed to disk at the end of the `with` block, and rolled back on an error.
        """
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
