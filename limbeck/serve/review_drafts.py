"""Drafts of reviews, stored while people type, and holds on rows that a person has open.

A queue holds the rows (examples for training) of one stage that people review. A hold keeps a row from being
offered to other people for `HOLD_SECONDS`.
"""

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
    """An unfinished review: the edited text of the row, and the reason for a rejection.

    `Draft("<think> mended </think> 4", "")`
    """

    text: str = ""
    reason: str = ""


class DraftKey(NamedTuple):
    """The key of a draft or a hold: the queue's folder name, the row's id and the person's name."""

    queue: str
    row: str
    person: str


class Drafts:
    """The drafts and holds of all queues.

    Every method is one transaction, which is on disk when the method returns.
    """

    def __init__(self, folder: Path):
        self.database = SQLiteStore(folder / "desk.sqlite", SCHEMA)

    def save(self, key: DraftKey, draft: Draft) -> None:
        """Store a draft, and renew the person's hold on the row."""
        with self.database.open() as db:
            db.execute("REPLACE INTO draft VALUES (?, ?, ?, ?, ?)", (*key, draft.text, draft.reason))
            _hold(db, key)

    def find(self, key: DraftKey) -> Draft | None:
        """Return a person's draft of a row, None if there is none."""
        with self.database.open() as db:
            row = db.execute(
                "SELECT text, reason FROM draft WHERE (queue, row, person) = (?, ?, ?)", key
            ).fetchone()
        return Draft(*row) if row else None

    def begun(self, queue: str, person: str) -> set[str]:
        """Return the ids of the rows of a queue for which this person has a draft."""
        with self.database.open() as db:
            rows = db.execute("SELECT row FROM draft WHERE (queue, person) = (?, ?)", (queue, person))
            return {row["row"] for row in rows}

    def drop(self, key: DraftKey) -> None:
        """Delete a person's draft of a row, and the person's hold on it."""
        with self.database.open() as db:
            for table in ("draft", "held"):
                db.execute(f"DELETE FROM {table} WHERE (queue, row, person) = (?, ?, ?)", key)

    def hold(self, key: DraftKey) -> None:
        """Hold a row for a person for `HOLD_SECONDS`, unless somebody else holds it.

        A hold locks nothing: other people are offered other rows first, but may still open this one.
        """
        with self.database.open() as db:
            _hold(db, key)

    def held_by_others(self, queue: str, person: str) -> set[str]:
        """Return the ids of the rows of a queue that people other than this one hold now."""
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
