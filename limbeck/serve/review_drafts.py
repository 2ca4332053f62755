"""What people at the desk have begun and not yet said: kept as they type, and whose row is whose for the moment."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from .sqlite_store import SQLiteStore

SCHEMA = [
    """CREATE TABLE draft (queue TEXT, row TEXT, person TEXT, text TEXT, reason TEXT, PRIMARY KEY (queue, row, person));
    CREATE TABLE held (queue TEXT, row TEXT, person TEXT, until REAL, PRIMARY KEY (queue, row))"""
]
PATIENCE = 600.0  # seconds for which a row that somebody opened is not given to others


@dataclass(frozen=True)
class Draft:
    """`Draft("<think> mended </think> 4", "")`: an edited text, empty where none was begun, and a reason."""

    text: str
    reason: str


class Drafts:
    """Drafts and held rows of all queues; a queue goes by its folder's name, a person by the name they gave."""

    def __init__(self, folder: Path):
        self.shelf = SQLiteStore(folder / "desk.sqlite", SCHEMA)

    def keep(self, queue: str, row: str, person: str, draft: Draft) -> None:
        """On disk when this returns; it also holds the row for another while."""
        with self.shelf.open() as db:
            db.execute(
                "REPLACE INTO draft VALUES (?, ?, ?, ?, ?)", (queue, row, person, draft.text, draft.reason)
            )
            _hold(db, queue, row, person)

    def find(self, queue: str, row: str, person: str) -> Draft | None:
        with self.shelf.open() as db:
            found = db.execute(
                "SELECT text, reason FROM draft WHERE (queue, row, person) = (?, ?, ?)", (queue, row, person)
            ).fetchone()
        return Draft(*found) if found else None

    def begun(self, queue: str, person: str) -> set[str]:
        """The rows of which this person has a draft."""
        with self.shelf.open() as db:
            return {
                row
                for (row,) in db.execute(
                    "SELECT row FROM draft WHERE (queue, person) = (?, ?)", (queue, person)
                )
            }

    def drop(self, queue: str, row: str, person: str) -> None:
        """The person has had their say, or will not: neither draft nor row is held any longer."""
        with self.shelf.open() as db:
            for table in ("draft", "held"):
                db.execute(
                    f"DELETE FROM {table} WHERE (queue, row, person) = (?, ?, ?)", (queue, row, person)
                )

    def hold(self, queue: str, row: str, person: str) -> None:
        """Somebody looks at this row: others are given the next one. It forbids nobody anything."""
        with self.shelf.open() as db:
            _hold(db, queue, row, person)

    def held(self, queue: str, person: str) -> set[str]:
        """The rows that others look at now."""
        with self.shelf.open() as db:
            found = db.execute(
                "SELECT row FROM held WHERE queue = ? AND person <> ? AND until > ?",
                (queue, person, time.time()),
            )
            return {row for (row,) in found}


def _hold(db: object, queue: str, row: str, person: str) -> None:
    db.execute(
        "INSERT INTO held VALUES (?, ?, ?, ?) ON CONFLICT (queue, row) DO UPDATE SET person = excluded.person, until = excluded.until "
        "WHERE held.person = excluded.person OR held.until < ?",
        (queue, row, person, time.time() + PATIENCE, time.time()),
    )
