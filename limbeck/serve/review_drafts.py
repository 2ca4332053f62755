"""Drafts of the review page, stored as people type, and holds on rows that a person has open."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .sqlite_store import SQLiteStore

SCHEMA = [
    """CREATE TABLE draft (queue TEXT, row TEXT, person TEXT, text TEXT, reason TEXT,
        PRIMARY KEY (queue, row, person));
    CREATE TABLE held (queue TEXT, row TEXT, person TEXT, until REAL, PRIMARY KEY (queue, row))"""
]
HOLD_SECONDS = 600.0  # seconds for which an opened row is not offered to others


@dataclass(frozen=True)
class Draft:
    """An unfinished review, the edited text and the reason: `Draft("<think> mended </think> 4", "")`."""

    text: str = ""
    reason: str = ""


class DraftKey(NamedTuple):
    """The owner of a draft or a hold: the queue's folder name, the row's id and the person's name."""

    queue: str
    row: str
    person: str


class Drafts:
    """Drafts and holds of all queues. Every method is one transaction, on disk when it returns."""

    def __init__(self, folder: Path):
        self.database = SQLiteStore(folder / "desk.sqlite", SCHEMA)

    def save(self, key: DraftKey, draft: Draft) -> None:
        """Store a draft, and renew the hold on its row."""
        with self.database.open() as db:
            db.execute("REPLACE INTO draft VALUES (?, ?, ?, ?, ?)", (*key, draft.text, draft.reason))
            _hold(db, key)

    def find(self, key: DraftKey) -> Draft | None:
        """A person's draft of a row."""
        with self.database.open() as db:
            row = db.execute(
                "SELECT text, reason FROM draft WHERE (queue, row, person) = (?, ?, ?)", key
            ).fetchone()
        return Draft(*row) if row else None

    def begun(self, queue: str, person: str) -> set[str]:
        """Ids of the rows of which this person has a draft."""
        with self.database.open() as db:
            rows = db.execute("SELECT row FROM draft WHERE (queue, person) = (?, ?)", (queue, person))
            return {row["row"] for row in rows}

    def drop(self, key: DraftKey) -> None:
        """Delete the draft and the hold of a person on a row."""
        with self.database.open() as db:
            for table in ("draft", "held"):
                db.execute(f"DELETE FROM {table} WHERE (queue, row, person) = (?, ?, ?)", key)

    def hold(self, key: DraftKey) -> None:
        """Hold a row for a person, unless another one holds it.

        Others are sent to later rows first; nothing is locked.
        """
        with self.database.open() as db:
            _hold(db, key)

    def held_by_others(self, queue: str, person: str) -> set[str]:
        """Ids of the rows that other people hold now."""
        with self.database.open() as db:
            rows = db.execute(
                "SELECT row FROM held WHERE queue = ? AND person <> ? AND until > ?",
                (queue, person, time.time()),
            )
            return {row["row"] for row in rows}


def _hold(db: sqlite3.Connection, key: DraftKey) -> None:
    now = time.time()
    db.execute(
        "INSERT INTO held VALUES (?, ?, ?, ?) "
        "ON CONFLICT (queue, row) DO UPDATE SET person = excluded.person, until = excluded.until "
        "WHERE held.person = excluded.person OR held.until < ?",
        (*key, now + HOLD_SECONDS, now),
    )
