"""The arena's book: battles, their answers and the votes on them. Rows are added and never changed.

Every vote is sealed with the one before it, so that a changed or missing line shows (a line cut off at the end does not).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..eval.arena_ratings import Vote, style_of
from ..types import Problem
from .sessions import secret
from .sqlite_store import SQLiteStore

FILE = "votes.db"
OUTCOMES = ("a", "b", "tie", "bad")
PER_HOUR = 120  # battles that one person may begin, and so the votes that they may cast
SCHEMA = ["""
CREATE TABLE battles (id TEXT PRIMARY KEY, token TEXT NOT NULL, voter TEXT NOT NULL, made REAL NOT NULL, prompt TEXT NOT NULL,
    language TEXT NOT NULL, origin TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL, a_from TEXT NOT NULL, b_from TEXT NOT NULL,
    seed INTEGER NOT NULL, wish TEXT NOT NULL);
CREATE INDEX battles_of ON battles (voter, made);
CREATE TABLE answers (battle TEXT PRIMARY KEY REFERENCES battles, a TEXT NOT NULL, b TEXT NOT NULL, style TEXT NOT NULL,
    leak TEXT NOT NULL, made REAL NOT NULL);
CREATE TABLE votes (number INTEGER PRIMARY KEY, battle TEXT NOT NULL REFERENCES answers, voter TEXT NOT NULL, judge INTEGER NOT NULL,
    outcome TEXT NOT NULL, made REAL NOT NULL, seal TEXT NOT NULL);
CREATE UNIQUE INDEX one_vote ON votes (battle) WHERE judge = 0;
CREATE UNIQUE INDEX one_judgement ON votes (battle, voter) WHERE judge = 1
"""]  # fmt: skip


class Refused(Exception):
    """What cannot be done: `key` is the phrase that says why, `status` HTTP's number for it."""

    def __init__(self, key: str, status: int):
        super().__init__(key)
        self.key, self.status = key, status


@dataclass(frozen=True)
class Answer:
    """What one side said: `Answer("4", thought="2 and 2", tokens=9, thought_tokens=6, finish="stop", seconds=1.2)`."""

    text: str
    thought: str = ""
    tokens: int = 0
    thought_tokens: int = 0
    finish: str = "stop"
    seconds: float = 0.0


@dataclass(frozen=True)
class Battle:
    """Two models on one prompt. `answers` is empty until both are there, `outcome` until its owner has voted; `leak` is the
    word by which an answer gave its author away. `wish` says what the owner asked for, so that the next one can be like it."""

    id: str
    token: str
    voter: str
    prompt: str
    language: str
    origin: str
    a: str
    b: str
    a_from: str
    b_from: str
    seed: int
    wish: dict[str, Any]
    answers: tuple[Answer, ...] = ()
    leak: str = ""
    outcome: str = ""


class VoteStore:
    """The book in a studio's folder; every method is one transaction."""

    def __init__(self, folder: Path):
        self.shelf, self.secret = SQLiteStore(folder / FILE, SCHEMA), secret(folder).encode()

    # ------------------------------------------------------------ battles

    def begin(
        self, voter: str, problem: Problem, sides: Sequence[str], sources: Sequence[str], wish: dict[str, Any]
    ) -> Battle:
        """A new battle, which nobody can guess the address of; Refused where the voter has begun too many of late."""
        battle = Battle(
            secrets.token_urlsafe(12),
            secrets.token_urlsafe(24),
            voter,
            problem.prompt,
            problem.language,
            problem.origin,
            *sides,
            *sources,
            seed=secrets.randbits(31),
            wish=wish,
        )
        now = time.time()
        with self.shelf.open() as db:
            (lately,) = db.execute(
                "SELECT count(*) FROM battles WHERE voter = ? AND made > ?", (voter, now - 3600)
            ).fetchone()
            if lately >= PER_HOUR:
                raise Refused("often", 429)
            row = {k: v for k, v in asdict(battle).items() if k not in ("answers", "leak", "outcome")} | {
                "made": now,
                "wish": json.dumps(wish),
            }
            db.execute(
                f"INSERT INTO battles ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
                [*row.values()],
            )
        return battle

    def answered(self, battle: Battle, a: Answer, b: Answer, leak: str) -> None:
        """Both answers at once: nobody ever sees one before the other. Those that are there already stay."""
        row = (
            battle.id,
            _json(asdict(a)),
            _json(asdict(b)),
            _json(style_of(a.text, b.text)),
            leak,
            time.time(),
        )
        with self.shelf.open() as db:
            db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def battle(self, name: str) -> Battle:
        """The battle of this id; Refused where there is none."""
        for battle in self._battles("WHERE battles.id = ?", name):
            return battle
        raise Refused("lost", 404)

    def waiting(self, voter: str) -> Battle | None:
        """The voter's newest battle if it was not voted on, and can be."""
        for battle in self._battles("WHERE battles.voter = ? ORDER BY battles.made DESC LIMIT 1", voter):
            return None if battle.outcome or battle.leak else battle
        return None

    def asked(self) -> dict[str, int]:
        """How often each prompt was asked."""
        with self.shelf.open() as db:
            return dict(
                tuple(row) for row in db.execute("SELECT prompt, count(*) FROM battles GROUP BY prompt")
            )

    def _battles(self, where: str, *values: Any) -> Iterator[Battle]:
        with self.shelf.open() as db:
            rows = db.execute(
                "SELECT battles.*, answers.a AS said_a, answers.b AS said_b, answers.leak, votes.outcome FROM battles "
                "LEFT JOIN answers ON answers.battle = battles.id LEFT JOIN votes ON votes.battle = battles.id AND votes.judge = 0 "
                + where,
                values,
            ).fetchall()
        for row in rows:
            told = {name: row[name] for name in Battle.__dataclass_fields__ if name != "answers"}
            said = (
                tuple(Answer(**json.loads(row[side])) for side in ("said_a", "said_b"))
                if row["said_a"]
                else ()
            )
            yield Battle(
                **told
                | {
                    "wish": json.loads(row["wish"]),
                    "answers": said,
                    "leak": row["leak"] or "",
                    "outcome": row["outcome"] or "",
                }
            )

    # ------------------------------------------------------------ votes

    def vote(self, name: str, token: str, voter: str, outcome: str) -> None:
        """One vote a battle, by whoever began it, with the token that only their page has; a second one changes nothing."""
        battle = self.battle(name)
        if battle.voter != voter or not hmac.compare_digest(token.encode(), battle.token.encode()):
            raise Refused("stranger", 403)
        if outcome not in OUTCOMES or not battle.answers or battle.leak:
            raise Refused("early", 409)
        if not battle.outcome:
            self._cast(name, voter, False, outcome)

    def judge(self, name: str, judge: str, outcome: str) -> None:
        """A judge's vote, after a person's; an empty outcome says that it abstained."""
        self._cast(name, judge, True, outcome)

    def unjudged(self, judge: str) -> list[Battle]:
        """Battles that people have voted on and this judge has not; its own are not for it to judge."""
        where = "WHERE votes.outcome <> '' AND ? NOT IN (battles.a, battles.b) AND battles.id NOT IN (SELECT battle FROM votes WHERE judge = 1 AND voter = ?)"
        return list(self._battles(where + " ORDER BY votes.number", judge, judge))

    def __len__(self) -> int:
        with self.shelf.open() as db:
            return db.execute("SELECT count(*) FROM votes").fetchone()[0]

    def votes(self) -> list[Vote]:
        """All of them in order. A name that stood for several models is told apart by where they came from."""
        with self.shelf.open() as db:
            rows = db.execute(f"{_LOG} ORDER BY votes.number").fetchall()
        called = _called(rows)
        return [
            Vote(
                called[r["a"], r["a_from"]],
                called[r["b"], r["b_from"]],
                r["outcome"],
                r["voter"],
                bool(r["judge"]),
                r["language"],
                tuple(json.loads(r["style"])),
                r["battle"],
                None if r["judge"] else r["made"] - r["ready"],
                r["made"],
            )
            for r in rows
        ]

    def preferences(self, judge: str = "") -> Iterator[dict[str, Any]]:
        """Rows with TRL's columns from the votes of people, or of one judge: what was preferred, what was not, and whence.

        What was voted on are answers; the thoughts behind them, which nobody saw, stand beside them.
        """
        with self.shelf.open() as db:
            rows = db.execute(
                f"{_LOG} WHERE votes.outcome IN ('a', 'b') AND votes.judge = ? ORDER BY votes.number",
                (int(bool(judge)),),
            ).fetchall()
        for row in rows:
            if judge and row["voter"] != judge:
                continue
            sides = ("a", "b") if row["outcome"] == "a" else ("b", "a")
            better, worse = (json.loads(row[f"said_{side}"]) for side in sides)
            if better["text"].strip() == worse["text"].strip():
                continue
            origin = {
                "battle": row["battle"],
                "judge" if judge else "voter": row["voter"],
                "problem": row["origin"],
            }
            models = {
                f"{what}_model": {"name": row[side], "from": row[f"{side}_from"]}
                for what, side in zip(("chosen", "rejected"), sides, strict=True)
            }
            yield {
                "id": f"arena/{row['battle']}",
                "prompt": row["prompt"],
                "chosen": better["text"],
                "rejected": worse["text"],
                "chosen_reasoning": better["thought"],
                "rejected_reasoning": worse["thought"],
                "language": row["language"],
                "origin": origin | models,
            }

    def broken(self) -> int | None:
        """The number of the first vote whose seal does not fit; None if all do."""
        before = ""
        with self.shelf.open() as db:
            for expected, row in enumerate(db.execute(f"{_LOG} ORDER BY votes.number"), 1):
                if row["number"] != expected or not hmac.compare_digest(row["seal"], self._seal(before, row)):
                    return expected
                before = row["seal"]
        return None

    def _cast(self, name: str, voter: str, judge: bool, outcome: str) -> None:
        with self.shelf.open() as db:
            last = db.execute("SELECT number, seal FROM votes ORDER BY number DESC LIMIT 1").fetchone()
            number, made = (last["number"] if last else 0) + 1, time.time()
            told = db.execute(
                "SELECT battles.*, answers.a AS said_a, answers.b AS said_b FROM battles JOIN answers ON answers.battle = battles.id WHERE id = ?",
                (name,),
            ).fetchone()
            record = {
                **dict(told),
                "number": number,
                "battle": name,
                "voter": voter,
                "judge": int(judge),
                "outcome": outcome,
                "made": made,
            }
            values = (
                number,
                name,
                voter,
                int(judge),
                outcome,
                made,
                self._seal(last["seal"] if last else "", record),
            )
            # the index holds back the second of two that come at once
            db.execute("INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def _seal(self, before: str, vote: sqlite3.Row | dict[str, Any]) -> str:
        sealed = [before, *(vote[name] for name in _SEALED)]
        return hmac.new(self.secret, _json(sealed).encode(), hashlib.sha256).hexdigest()


_SEALED = (
    "number",
    "battle",
    "voter",
    "judge",
    "outcome",
    "made",
    "a",
    "a_from",
    "b",
    "b_from",
    "prompt",
    "said_a",
    "said_b",
)
_LOG = (
    "SELECT votes.*, battles.a, battles.b, battles.a_from, battles.b_from, battles.prompt, battles.language, battles.origin, answers.a AS said_a, "
    "answers.b AS said_b, answers.style, answers.made AS ready FROM votes JOIN battles ON battles.id = votes.battle "
    "JOIN answers ON answers.battle = votes.battle"
)


def _called(rows: Sequence[sqlite3.Row]) -> dict[tuple[str, str], str]:
    seen = {(row[side], row[f"{side}_from"]) for row in rows for side in ("a", "b")}
    names = [name for name, _ in seen]
    return {(name, origin): name if names.count(name) == 1 else f"{name} ({origin})" for name, origin in seen}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
