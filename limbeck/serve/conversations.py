"""Conversations on disk: turns with their answers, and every branch that was left for another.

A turn is what a person asked. It has one answer a side (two models may answer side by side), each in as many variants as were
asked for. The next turn remembers after which answers it was asked: choose another variant, and what followed the old one
waits behind it. Of those that could stand in one place, the one shown last is shown.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..types import Message
from .sqlite_store import SQLiteStore

SCHEMA = (
    """
    CREATE TABLE conversation (id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, settings TEXT NOT NULL,
        changed REAL NOT NULL, version INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX conversation_changed ON conversation (changed);
    CREATE TABLE turn (id INTEGER PRIMARY KEY, conversation TEXT NOT NULL REFERENCES conversation ON DELETE CASCADE,
        parent INTEGER REFERENCES turn ON DELETE CASCADE, after TEXT NOT NULL, content TEXT NOT NULL, at REAL NOT NULL,
        shown INTEGER NOT NULL);
    CREATE INDEX turn_conversation ON turn (conversation);
    CREATE TABLE answer (id INTEGER PRIMARY KEY, turn INTEGER NOT NULL REFERENCES turn ON DELETE CASCADE, side INTEGER NOT NULL,
        model TEXT NOT NULL, settings TEXT NOT NULL, state TEXT NOT NULL, why TEXT NOT NULL DEFAULT '', at REAL NOT NULL,
        shown INTEGER NOT NULL, thought TEXT NOT NULL DEFAULT '', content TEXT NOT NULL DEFAULT '',
        meter TEXT NOT NULL DEFAULT '{}');
    CREATE INDEX answer_turn ON answer (turn);
    CREATE INDEX answer_shown ON answer (shown);
    CREATE INDEX turn_shown ON turn (shown);
    """,
)
TITLE = 60  # characters of the first question


@dataclass(frozen=True)
class Settings:
    """`Settings(("r1", "small"), 0.6, 2048)`: who answers, side by side, how warm, and how many tokens they may think (None: any)."""

    models: tuple[str, ...]
    temperature: float = 0.6
    budget: int | None = None


@dataclass(frozen=True)
class Meter:
    """What an answer took: tokens and seconds of the thought and of the whole; `cost` where a price is set."""

    thought_tokens: int = 0
    tokens: int = 0
    thought_seconds: float = 0.0
    seconds: float = 0.0
    cost: float | None = None


@dataclass(frozen=True)
class Answer:
    """One answer of one model; `variants` are all that could stand in its place."""

    id: int
    turn: int
    side: int
    model: str
    settings: Settings
    state: str
    why: str
    thought: str
    content: str
    meter: Meter
    variants: tuple[int, ...] = ()

    @property
    def running(self) -> bool:
        return self.state == "running"


@dataclass(frozen=True)
class Turn:
    """What was asked, and the answers on view, one a side."""

    id: int
    parent: int | None
    content: str
    answers: tuple[Answer, ...]
    variants: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """`turns` is the branch on view, from the first question on; empty in a list."""

    id: str
    owner: str
    title: str
    settings: Settings
    changed: float
    version: int
    turns: tuple[Turn, ...] = field(default=())


class Conversations:
    """The file of all conversations. Every method is one transaction; an id that there is not gives None or KeyError."""

    def __init__(self, path: Path):
        self.shelf = SQLiteStore(path, SCHEMA)
        with self.shelf.open() as db:  # the server that gave these is gone
            db.execute("UPDATE answer SET state = 'interrupted' WHERE state = 'running'")

    def start(self, owner: str, settings: Settings) -> str:
        """A new conversation without turns; its id cannot be guessed."""
        name = secrets.token_urlsafe(12)
        with self.shelf.open() as db:
            db.execute(
                "INSERT INTO conversation (id, owner, title, settings, changed) VALUES (?, ?, '', ?, ?)",
                (name, owner, _text(settings), time.time()),
            )
        return name

    def listed(self, owner: str, before: float = float("inf"), most: int = 50) -> list[Conversation]:
        """Somebody's conversations, and those that nobody signed; the latest first."""
        with self.shelf.open() as db:
            rows = db.execute(
                "SELECT * FROM conversation WHERE owner IN (?, '') AND changed < ? ORDER BY changed DESC LIMIT ?",
                (owner, before, most),
            )
            return [_conversation(row) for row in rows]

    def read(self, name: str) -> Conversation | None:
        """The branch on view."""
        with self.shelf.open() as db:
            row = db.execute("SELECT * FROM conversation WHERE id = ?", (name,)).fetchone()
            return _conversation(row, _branch(db, name)) if row else None

    def version(self, name: str) -> int | None:
        """Grows with everything that changes what a page shows, but for an answer's growing."""
        with self.shelf.open() as db:
            row = db.execute("SELECT version FROM conversation WHERE id = ?", (name,)).fetchone()
            return row["version"] if row else None

    def answer(self, number: int) -> tuple[str, Answer] | None:
        """An answer and the conversation it is of."""
        with self.shelf.open() as db:
            row = db.execute(
                "SELECT answer.*, conversation FROM answer JOIN turn ON turn.id = turn WHERE answer.id = ?",
                (number,),
            ).fetchone()
            if row is None:
                return None
            same = db.execute(
                "SELECT id FROM answer WHERE turn = ? AND side = ? ORDER BY id", (row["turn"], row["side"])
            )
            return row["conversation"], _answer(row, tuple(one["id"] for one in same))

    def ask(self, name: str, parent: int | None, content: str, settings: Settings) -> list[int]:
        """A turn after another (None: the first); its running answers, one a side."""
        with self.shelf.open() as db:
            after = _shown_answers(db, parent) if parent else []
            return _ask(db, name, parent, json.dumps(after), content, settings)

    def edit(self, name: str, turn: int, content: str, settings: Settings) -> list[int]:
        """A turn in another's place; what followed the other one stays with it."""
        with self.shelf.open() as db:
            old = db.execute(
                "SELECT parent, after FROM turn WHERE id = ? AND conversation = ?", (turn, name)
            ).fetchone()
            if old is None:
                raise KeyError(turn)
            return _ask(db, name, old["parent"], old["after"], content, settings)

    def again(self, name: str, answer: Answer, settings: Settings) -> int:
        """Another variant of an answer, by the same model."""
        with self.shelf.open() as db:
            _touch(db, name)
            return _begin(db, answer.turn, answer.side, answer.model, settings)

    def show(self, name: str, turn: int | None = None, answer: int | None = None) -> None:
        """Put a variant on view."""
        with self.shelf.open() as db:
            if turn is not None:
                db.execute(
                    "UPDATE turn SET shown = ? WHERE id = ? AND conversation = ?",
                    (_next(db, "turn"), turn, name),
                )
            if answer is not None:
                db.execute(
                    "UPDATE answer SET shown = ? WHERE id = ? AND turn IN (SELECT id FROM turn WHERE conversation = ?)",
                    (_next(db, "answer"), answer, name),
                )
            _touch(db, name)

    def save(
        self, number: int, thought: str, content: str, meter: Meter, state: str = "running", why: str = ""
    ) -> None:
        """Add what was said since; with another state, the answer has ended."""
        with self.shelf.open() as db:
            db.execute(
                "UPDATE answer SET thought = thought || ?, content = content || ?, meter = ?, state = ?, why = ? WHERE id = ?",
                (thought, content, _text(meter), state, why, number),
            )
            if state != "running":
                row = db.execute(
                    "SELECT conversation FROM turn JOIN answer ON turn = turn.id WHERE answer.id = ?",
                    (number,),
                ).fetchone()
                _touch(db, row["conversation"] if row else "")

    def rename(self, name: str, title: str) -> None:
        with self.shelf.open() as db:
            db.execute("UPDATE conversation SET title = ?, version = version + 1 WHERE id = ?", (title, name))

    def delete(self, name: str) -> None:
        with self.shelf.open() as db:
            db.execute("DELETE FROM conversation WHERE id = ?", (name,))

    def messages(self, number: int) -> list[Message]:
        """What the model is to answer: its own side of the branch that leads to the answer. Thoughts of earlier turns
        are left out, as R1 was trained."""
        with self.shelf.open() as db:
            here = db.execute("SELECT turn, side FROM answer WHERE id = ?", (number,)).fetchone()
            turn = db.execute("SELECT * FROM turn WHERE id = ?", (here["turn"],)).fetchone()
            said: list[Message] = [{"role": "user", "content": turn["content"]}]
            while turn["parent"] is not None:
                after = json.loads(turn["after"])
                mine = after[here["side"]] if here["side"] < len(after) else after[0]
                content = db.execute("SELECT content FROM answer WHERE id = ?", (mine,)).fetchone()["content"]
                turn = db.execute("SELECT * FROM turn WHERE id = ?", (turn["parent"],)).fetchone()
                said = [
                    {"role": "user", "content": turn["content"]},
                    {"role": "assistant", "content": content},
                    *said,
                ]
            return said


def _ask(
    db: sqlite3.Connection, name: str, parent: int | None, after: str, content: str, settings: Settings
) -> list[int]:
    turn = db.execute(
        "INSERT INTO turn (conversation, parent, after, content, at, shown) VALUES (?, ?, ?, ?, ?, ?)",
        (name, parent, after, content, time.time(), _next(db, "turn")),
    ).lastrowid
    title = " ".join(content.split())
    db.execute(
        "UPDATE conversation SET settings = ?, title = CASE title WHEN '' THEN ? ELSE title END WHERE id = ?",
        (_text(settings), title if len(title) <= TITLE else title[: TITLE - 1] + "…", name),
    )
    _touch(db, name)
    return [_begin(db, turn, side, model, settings) for side, model in enumerate(settings.models)]


def _begin(db: sqlite3.Connection, turn: int, side: int, model: str, settings: Settings) -> int:
    return db.execute(
        "INSERT INTO answer (turn, side, model, settings, state, at, shown) VALUES (?, ?, ?, ?, 'running', ?, ?)",
        (turn, side, model, _text(settings), time.time(), _next(db, "answer")),
    ).lastrowid


def _touch(db: sqlite3.Connection, name: str) -> None:
    db.execute("UPDATE conversation SET changed = ?, version = version + 1 WHERE id = ?", (time.time(), name))


def _next(db: sqlite3.Connection, table: str) -> int:
    return db.execute(f"SELECT COALESCE(MAX(shown), 0) + 1 FROM {table}").fetchone()[0]


def _shown_answers(db: sqlite3.Connection, turn: int) -> list[int]:
    """Of each side the answer on view; SQLite takes the other columns from the row of the maximum."""
    rows = db.execute("SELECT id, MAX(shown) FROM answer WHERE turn = ? GROUP BY side ORDER BY side", (turn,))
    return [row["id"] for row in rows]


def _branch(db: sqlite3.Connection, name: str) -> tuple[Turn, ...]:
    """From the first turn on view to the last."""
    turns = db.execute("SELECT * FROM turn WHERE conversation = ? ORDER BY id", (name,)).fetchall()
    found: list[Turn] = []
    parent, after = None, "[]"
    while rivals := [turn for turn in turns if turn["parent"] == parent and turn["after"] == after]:
        turn = max(rivals, key=lambda one: one["shown"])
        answers = tuple(_full(db, number) for number in _shown_answers(db, turn["id"]))
        found.append(Turn(turn["id"], parent, turn["content"], answers, tuple(one["id"] for one in rivals)))
        parent, after = turn["id"], json.dumps([answer.id for answer in answers])
    return tuple(found)


def _full(db: sqlite3.Connection, number: int) -> Answer:
    row = db.execute("SELECT * FROM answer WHERE id = ?", (number,)).fetchone()
    same = db.execute(
        "SELECT id FROM answer WHERE turn = ? AND side = ? ORDER BY id", (row["turn"], row["side"])
    )
    return _answer(row, tuple(one["id"] for one in same))


def _conversation(row: sqlite3.Row, turns: tuple[Turn, ...] = ()) -> Conversation:
    settings = _settings(row["settings"])
    return Conversation(
        row["id"], row["owner"], row["title"], settings, row["changed"], row["version"], turns
    )


def _answer(row: sqlite3.Row, variants: tuple[int, ...]) -> Answer:
    meter = Meter(**json.loads(row["meter"]))
    return Answer(
        row["id"],
        row["turn"],
        row["side"],
        row["model"],
        _settings(row["settings"]),
        row["state"],
        row["why"],
        row["thought"],
        row["content"],
        meter,
        variants,
    )


def _settings(text: str) -> Settings:
    said = json.loads(text)
    return Settings(tuple(said["models"]), said["temperature"], said["budget"])


def _text(thing: Any) -> str:
    return json.dumps(vars(thing))
