"""Conversations on disk: their turns and answers, with all branches.

A turn is a person's question and its answers. Two models may answer side by side; each position is called a
side (0 or 1). A side of a turn may have several answers and a place in the conversation several questions;
these alternatives are called variants, and the variant that was shown last is the one on view. Every turn
records which answers it follows. If another variant of one of these answers is put on view, the turns that
follow the old variant are hidden with it, but kept: each choice of variants has its own branch of later
turns.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..types import Message
from .sqlite_store import SQLiteStore

SCHEMA = (
    """
    CREATE TABLE conversation (id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL,
        settings TEXT NOT NULL, changed REAL NOT NULL, version INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX conversation_changed ON conversation (changed);
    CREATE TABLE turn (id INTEGER PRIMARY KEY,
        conversation TEXT NOT NULL REFERENCES conversation ON DELETE CASCADE,
        parent INTEGER REFERENCES turn ON DELETE CASCADE, after TEXT NOT NULL, content TEXT NOT NULL,
        at REAL NOT NULL, shown INTEGER NOT NULL);
    CREATE INDEX turn_conversation ON turn (conversation);
    CREATE TABLE answer (id INTEGER PRIMARY KEY,
        turn INTEGER NOT NULL REFERENCES turn ON DELETE CASCADE, side INTEGER NOT NULL, model TEXT NOT NULL,
        settings TEXT NOT NULL, state TEXT NOT NULL, why TEXT NOT NULL DEFAULT '', at REAL NOT NULL,
        shown INTEGER NOT NULL, thought TEXT NOT NULL DEFAULT '', content TEXT NOT NULL DEFAULT '',
        meter TEXT NOT NULL DEFAULT '{}');
    CREATE INDEX answer_turn ON answer (turn);
    CREATE INDEX answer_shown ON answer (shown);
    CREATE INDEX turn_shown ON turn (shown);
    """,
)
MAX_TITLE = 60  # characters of the first question
PER_LIST = 50  # conversations in one list


@dataclass(frozen=True)
class Settings:
    """The settings of a turn: models that answer side by side, and how they are asked.

    `Settings(("r1", "small"), 0.6, 2048)`. `budget` is the limit of the thought in tokens, None for no limit,
    and `max_tokens` that of the whole answer, None for the server's. `system` is the system prompt; empty for
    that of the model's own problems, if they have one.
    """

    models: tuple[str, ...]
    temperature: float = 0.6
    budget: int | None = None
    top_p: float = 0.95
    max_tokens: int | None = None
    system: str = ""


@dataclass(frozen=True)
class Meter:
    """Tokens and seconds of an answer: of its thought alone, and of the whole with the thought.

    `cost` is in the unit of the model's price, None without a price.
    """

    thought_tokens: int = 0
    tokens: int = 0
    thought_seconds: float = 0.0
    seconds: float = 0.0
    cost: float | None = None


@dataclass(frozen=True)
class Answer:
    """One model's answer to a turn.

    `side` is its position beside the answers of other models. `state` is "running", "done", "length" (cut at
    the token limit), "stopped", "interrupted" or "failed", and `why` the reason of a failure. `variants` has
    the ids of all answers on the same side of the turn, this one included.
    """

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
        """True while the answer is being generated."""
        return self.state == "running"


@dataclass(frozen=True)
class Turn:
    """A question and, for each side, the answer on view.

    `parent` is the id of the previous turn, None for the first turn. `variants` has the ids of all questions
    at the same place, this one included.
    """

    id: int
    parent: int | None
    content: str
    answers: tuple[Answer, ...]
    variants: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A conversation; `turns` is the branch on view, from the first question on.

    `owner` is a person's name, or empty if anybody may continue it. `changed` is the Unix time of the last
    change, and `version` a number that grows with each change. `turns` is empty in results of
    `Conversations.recent`.
    """

    id: str
    owner: str
    title: str
    settings: Settings
    changed: float
    version: int
    turns: tuple[Turn, ...] = field(default=())


class Conversations:
    """The SQLite database of all conversations. Every method is one transaction.

    When the database is opened, answers that an earlier server left "running" become "interrupted".
    """

    def __init__(self, path: Path):
        self.database = SQLiteStore(path, SCHEMA)
        with self.database.open() as db:  # these were left running by an earlier server
            db.execute("UPDATE answer SET state = 'interrupted' WHERE state = 'running'")

    def start(self, owner: str, settings: Settings) -> str:
        """Create a conversation without turns, and return its id, which cannot be guessed."""
        name = secrets.token_urlsafe(12)
        with self.database.open() as db:
            db.execute(
                "INSERT INTO conversation (id, owner, title, settings, changed) VALUES (?, ?, '', ?, ?)",
                (name, owner, _json(settings), time.time()),
            )
        return name

    def recent(self, owner: str, before: float = float("inf"), limit: int = PER_LIST) -> list[Conversation]:
        """Return the conversations of an owner and those without an owner, the latest change first.

        Only conversations that changed before the Unix time `before`, and `limit` of them at most; without
        their turns.
        """
        with self.database.open() as db:
            rows = db.execute(
                "SELECT * FROM conversation WHERE owner IN (?, '') AND changed < ? "
                "ORDER BY changed DESC LIMIT ?",
                (owner, before, limit),
            )
            return [_conversation(row) for row in rows]

    def read(self, name: str) -> Conversation | None:
        """Return the conversation of this id with its branch on view, None for an unknown id."""
        with self.database.open() as db:
            row = db.execute("SELECT * FROM conversation WHERE id = ?", (name,)).fetchone()
            return _conversation(row, _branch(db, name)) if row else None

    def version(self, name: str) -> int | None:
        """Return the version of a conversation, None for an unknown id.

        The version is a number that grows with each change of what a page shows, except while an answer's
        text grows.
        """
        with self.database.open() as db:
            row = db.execute("SELECT version FROM conversation WHERE id = ?", (name,)).fetchone()
            return row["version"] if row else None

    def answer(self, number: int) -> tuple[str, Answer] | None:
        """Return the id of the conversation and the answer with the id `number`, None for an unknown id."""
        with self.database.open() as db:
            row = db.execute(
                "SELECT answer.*, conversation FROM answer JOIN turn ON turn.id = turn WHERE answer.id = ?",
                (number,),
            ).fetchone()
            if row is None:
                return None
            return row["conversation"], _answer(db, row)

    def ask(self, name: str, parent: int | None, content: str, settings: Settings) -> list[int]:
        """Add a question after the turn `parent`, or as the first turn if `parent` is None.

        Returns the ids of its new answers, one for each side; their state is "running".
        """
        with self.database.open() as db:
            after = _shown_answers(db, parent) if parent else []
            return _add_turn(db, _Place(name, parent, json.dumps(after)), content, settings)

    def edit(self, name: str, turn: int, content: str, settings: Settings) -> list[int]:
        """Add a question as a variant of the turn with the id `turn`, and put it on view.

        The old question keeps its answers and its later turns. Returns the ids of the new answers, one for
        each side; their state is "running". Raises KeyError if the conversation has no such turn.
        """
        with self.database.open() as db:
            old = db.execute(
                "SELECT parent, after FROM turn WHERE id = ? AND conversation = ?", (turn, name)
            ).fetchone()
            if old is None:
                raise KeyError(turn)
            return _add_turn(db, _Place(name, old["parent"], old["after"]), content, settings)

    def regenerate(self, name: str, answer: Answer, settings: Settings) -> int:
        """Add another answer by the same model, as a variant of `answer`. Returns the new answer's id."""
        with self.database.open() as db:
            _touch(db, name)
            return _add_answer(db, answer.turn, answer.side, answer.model, settings)

    def show(self, name: str, turn: int | None = None, answer: int | None = None) -> None:
        """Put a variant of a turn on view, a variant of an answer, or both; None leaves what is on view."""
        with self.database.open() as db:
            if turn is not None:
                db.execute(
                    "UPDATE turn SET shown = ? WHERE id = ? AND conversation = ?",
                    (_next_shown(db, "turn"), turn, name),
                )
            if answer is not None:
                db.execute(
                    "UPDATE answer SET shown = ? WHERE id = ? "
                    "AND turn IN (SELECT id FROM turn WHERE conversation = ?)",
                    (_next_shown(db, "answer"), answer, name),
                )
            _touch(db, name)

    def save(
        self, number: int, thought: str, content: str, meter: Meter, state: str = "running", why: str = ""
    ) -> None:
        """Append text to an answer's thought and content, and store its meter and its state.

        A state other than "running" ends the answer; `why` is the reason of a failure.
        """
        with self.database.open() as db:
            db.execute(
                "UPDATE answer SET thought = thought || ?, content = content || ?, "
                "meter = ?, state = ?, why = ? WHERE id = ?",
                (thought, content, _json(meter), state, why, number),
            )
            if state == "running":
                return
            row = db.execute(
                "SELECT conversation FROM turn JOIN answer ON turn = turn.id WHERE answer.id = ?", (number,)
            ).fetchone()
            _touch(db, row["conversation"] if row else "")

    def rename(self, name: str, title: str) -> None:
        """Change the title of a conversation."""
        with self.database.open() as db:
            db.execute("UPDATE conversation SET title = ?, version = version + 1 WHERE id = ?", (title, name))

    def delete(self, name: str) -> None:
        """Delete a conversation with all its turns and answers."""
        with self.database.open() as db:
            db.execute("DELETE FROM conversation WHERE id = ?", (name,))

    def messages(self, number: int) -> list[Message]:
        """Return the messages that the answer with the id `number` replies to, as its model's prompt.

        They are the questions up to this answer and the earlier answers on its own side, along the branch
        that leads to it. Thoughts of earlier turns are left out, as in the training of DeepSeek-R1.
        """
        with self.database.open() as db:
            answer = db.execute("SELECT turn, side FROM answer WHERE id = ?", (number,)).fetchone()
            turn = _row(db, "turn", answer["turn"])
            newest_first: list[Message] = [{"role": "user", "content": turn["content"]}]
            while turn["parent"] is not None:
                content = _row(db, "answer", _answer_before(turn, answer["side"]))["content"]
                turn = _row(db, "turn", turn["parent"])
                newest_first.append({"role": "assistant", "content": content})
                newest_first.append({"role": "user", "content": turn["content"]})
        return newest_first[::-1]


class _Place(NamedTuple):
    """The place of a turn in a conversation.

    It consists of the conversation's id, the id of the previous turn (None for the first turn), and the ids
    of the answers that the turn follows, as a JSON list.
    """

    conversation: str
    parent: int | None
    after: str


def _row(db: sqlite3.Connection, table: str, number: int) -> sqlite3.Row:
    return db.execute(f"SELECT * FROM {table} WHERE id = ?", (number,)).fetchone()


def _answer_before(turn: sqlite3.Row, side: int) -> int:
    """Return the id of the answer that a turn follows on one side.

    If the previous turn had fewer sides, this is the answer of its first side.
    """
    after = json.loads(turn["after"])
    return after[side] if side < len(after) else after[0]


def _add_turn(db: sqlite3.Connection, place: _Place, content: str, settings: Settings) -> list[int]:
    """Insert a turn with a running answer for each model, and return the answers' ids.

    The question becomes the title of a conversation that has none.
    """
    turn = db.execute(
        "INSERT INTO turn (conversation, parent, after, content, at, shown) VALUES (?, ?, ?, ?, ?, ?)",
        (*place, content, time.time(), _next_shown(db, "turn")),
    ).lastrowid
    db.execute(
        "UPDATE conversation SET settings = ?, title = CASE title WHEN '' THEN ? ELSE title END WHERE id = ?",
        (_json(settings), _title(content), place.conversation),
    )
    _touch(db, place.conversation)
    return [_add_answer(db, turn, side, model, settings) for side, model in enumerate(settings.models)]


def _title(content: str) -> str:
    """Return a question as a title: on one line, cut at `MAX_TITLE` characters."""
    title = " ".join(content.split())
    return title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 1] + "…"


def _add_answer(db: sqlite3.Connection, turn: int, side: int, model: str, settings: Settings) -> int:
    return db.execute(
        "INSERT INTO answer (turn, side, model, settings, state, at, shown) "
        "VALUES (?, ?, ?, ?, 'running', ?, ?)",
        (turn, side, model, _json(settings), time.time(), _next_shown(db, "answer")),
    ).lastrowid


def _touch(db: sqlite3.Connection, name: str) -> None:
    """Set the time of a conversation's last change to now, and increase its version."""
    db.execute("UPDATE conversation SET changed = ?, version = version + 1 WHERE id = ?", (time.time(), name))


def _next_shown(db: sqlite3.Connection, table: str) -> int:
    """Return a number greater than all others in the column `shown` of a table.

    Of several variants, the one with the greatest number is on view.
    """
    return db.execute(f"SELECT COALESCE(MAX(shown), 0) + 1 FROM {table}").fetchone()[0]


def _shown_answers(db: sqlite3.Connection, turn: int) -> list[int]:
    """Return the ids of a turn's answers on view, one for each side in order.

    The query relies on SQLite, which takes the bare column `id` from the row that has the maximum.
    """
    rows = db.execute("SELECT id, MAX(shown) FROM answer WHERE turn = ? GROUP BY side ORDER BY side", (turn,))
    return [row["id"] for row in rows]


def _branch(db: sqlite3.Connection, name: str) -> tuple[Turn, ...]:
    """Return the turns on view, from the first to the last."""
    turns = db.execute("SELECT * FROM turn WHERE conversation = ? ORDER BY id", (name,)).fetchall()
    branch: list[Turn] = []
    parent: int | None = None
    after = "[]"
    while True:
        variants = [turn for turn in turns if turn["parent"] == parent and turn["after"] == after]
        if not variants:
            return tuple(branch)
        shown = max(variants, key=lambda turn: turn["shown"])
        answers = tuple(_answer(db, _row(db, "answer", number)) for number in _shown_answers(db, shown["id"]))
        ids = tuple(turn["id"] for turn in variants)
        branch.append(Turn(shown["id"], parent, shown["content"], answers, ids))
        parent = shown["id"]
        after = json.dumps([answer.id for answer in answers])


def _conversation(row: sqlite3.Row, turns: tuple[Turn, ...] = ()) -> Conversation:
    settings = _settings(row["settings"])
    return Conversation(
        row["id"], row["owner"], row["title"], settings, row["changed"], row["version"], turns
    )


def _answer(db: sqlite3.Connection, row: sqlite3.Row) -> Answer:
    variants = db.execute(
        "SELECT id FROM answer WHERE turn = ? AND side = ? ORDER BY id", (row["turn"], row["side"])
    )
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
        Meter(**json.loads(row["meter"])),
        tuple(variant["id"] for variant in variants),
    )


def _settings(text: str) -> Settings:
    values = json.loads(text)
    return Settings(**{**values, "models": tuple(values["models"])})


def _json(values: Settings | Meter) -> str:
    return json.dumps(vars(values))
