"""The database of the arena: battles, their answers and the votes on them. Rows are added and never changed.

A battle is one prompt answered by two contestants, called the sides a and b. Each vote has a seal: an HMAC
over the vote and the seal before it. A vote that was changed or removed breaks this chain; the removal of the
last votes goes unnoticed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..eval.arena_ratings import Vote, style_of
from ..types import Problem
from .sessions import secret
from .sqlite_store import SQLiteStore

FILE = "votes.db"
OUTCOMES = ("a", "b", "tie", "bad")
IDENTICAL = "(identical answers)"  # the voter of a battle whose answers are equal: nobody is asked
PER_HOUR = 120  # battles that one person may begin in an hour, and so the most votes that they can cast
SCHEMA = [
    """
    CREATE TABLE battles (id TEXT PRIMARY KEY, token TEXT NOT NULL, voter TEXT NOT NULL, made REAL NOT NULL,
        prompt TEXT NOT NULL, language TEXT NOT NULL, origin TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL,
        a_from TEXT NOT NULL, b_from TEXT NOT NULL, seed INTEGER NOT NULL, wish TEXT NOT NULL);
    CREATE INDEX battles_of ON battles (voter, made);
    CREATE TABLE answers (battle TEXT PRIMARY KEY REFERENCES battles, a TEXT NOT NULL, b TEXT NOT NULL,
        style TEXT NOT NULL, leak TEXT NOT NULL, made REAL NOT NULL);
    CREATE TABLE votes (number INTEGER PRIMARY KEY, battle TEXT NOT NULL REFERENCES answers,
        voter TEXT NOT NULL, judge INTEGER NOT NULL, outcome TEXT NOT NULL, made REAL NOT NULL,
        seal TEXT NOT NULL);
    CREATE UNIQUE INDEX one_vote ON votes (battle) WHERE judge = 0;
    CREATE UNIQUE INDEX one_judgement ON votes (battle, voter) WHERE judge = 1
    """
]
SEALED_COLUMNS = (
    "number", "battle", "voter", "judge", "outcome", "made", "a", "a_from", "b", "b_from", "prompt",
    "said_a", "said_b",
)  # fmt: skip
SELECT_BATTLES = """
SELECT battles.*, answers.a AS said_a, answers.b AS said_b, answers.leak, votes.outcome
FROM battles
LEFT JOIN answers ON answers.battle = battles.id
LEFT JOIN votes ON votes.battle = battles.id AND votes.judge = 0
"""
SELECT_VOTES = """
SELECT votes.*, battles.a, battles.b, battles.a_from, battles.b_from, battles.prompt, battles.language,
    battles.origin, answers.a AS said_a, answers.b AS said_b, answers.style, answers.made AS ready
FROM votes
JOIN battles ON battles.id = votes.battle
JOIN answers ON answers.battle = votes.battle
"""


class Refused(Exception):
    """A request that the arena refuses.

    `key` names the phrase that tells the reason, `status` is the HTTP status.
    """

    def __init__(self, key: str, status: int):
        super().__init__(key)
        self.key = key
        self.status = status


@dataclass(frozen=True)
class Answer:
    """The answer of one side of a battle.

    `Answer("4", thought="2 and 2", tokens=9, thought_tokens=6, seconds=1.2)`. `tokens` counts the whole
    output with the thought; `finish` is "stop" or "length".
    """

    text: str
    thought: str = ""
    tokens: int = 0
    thought_tokens: int = 0
    finish: str = "stop"
    seconds: float = 0.0


@dataclass(frozen=True)
class Battle:
    """A battle between the contestants `a` and `b` on one prompt.

    `voter` is the owner, who began the battle and may vote on it, with the `token` of its page. `a_from` and
    `b_from` name the weights behind the contestants, or are "saved". `origin` tells where the prompt is from.
    `options` are what the owner chose; the page of the next battle offers them again.

    `answers` is empty until both answers are complete. `leak` is the word by which an answer names its
    author, which makes a vote impossible. `outcome` is empty until the owner has voted, then "a", "b", "tie"
    or "bad".
    """

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
    options: dict[str, Any]
    answers: tuple[Answer, ...] = ()
    leak: str = ""
    outcome: str = ""

    @property
    def identical(self) -> bool:
        """True if both answers are there and their texts are equal, apart from white space around them."""
        return len({answer.text.strip() for answer in self.answers}) == 1


class VoteStore:
    """The battles and votes in a studio's folder. Every method is one transaction."""

    def __init__(self, folder: Path):
        self.database = SQLiteStore(folder / FILE, SCHEMA)
        self.secret = secret(folder).encode()

    # ------------------------------------------------------------ battles

    def begin(
        self,
        voter: str,
        problem: Problem,
        sides: Sequence[str],
        sources: Sequence[str],
        options: dict[str, Any],
    ) -> Battle:
        """Store and return a new battle, whose id cannot be guessed.

        `sides` are the names of the contestants a and b, and `sources` the names of their weights. Raises
        Refused if the voter has begun `PER_HOUR` battles within the last hour.
        """
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
            options=options,
        )
        now = time.time()
        with self.database.open() as db:
            recent = db.execute(
                "SELECT count(*) FROM battles WHERE voter = ? AND made > ?", (voter, now - 3600)
            ).fetchone()
            if recent[0] >= PER_HOUR:
                raise Refused("often", 429)
            _insert_battle(db, battle, now)
        return battle

    def add_answers(self, battle: Battle, a: Answer, b: Answer, leak: str) -> None:
        """Store both answers of a battle and the leak, a word by which one of them names its author.

        If the battle has answers already, these are kept. `leak` is empty if there is no such word. Equal
        answers are a tie by `IDENTICAL`, on which nobody is asked: left out, they would make models look more
        different than they are, and their pair would be drawn again and again.
        """
        style = style_of(a.text, b.text)
        row = (battle.id, _json(asdict(a)), _json(asdict(b)), _json(style), leak, time.time())
        with self.database.open() as db:
            db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
        if not leak and self.battle(battle.id).identical:
            self._cast(battle.id, IDENTICAL, False, "tie")

    def battle(self, battle_id: str) -> Battle:
        """Return the battle with this id. Raises Refused for an unknown id."""
        for battle in self._battles("WHERE battles.id = ?", battle_id):
            return battle
        raise Refused("lost", 404)

    def waiting(self, voter: str) -> Battle | None:
        """Return the voter's newest battle if they can still vote on it, else None."""
        newest = "WHERE battles.voter = ? ORDER BY battles.made DESC LIMIT 1"
        for battle in self._battles(newest, voter):
            return None if battle.outcome or battle.leak else battle
        return None

    def prompt_counts(self) -> dict[str, int]:
        """Return the number of battles on each prompt."""
        with self.database.open() as db:
            rows = db.execute("SELECT prompt, count(*) FROM battles GROUP BY prompt").fetchall()
        return {row[0]: row[1] for row in rows}

    def _battles(self, where: str, *values: Any) -> Iterator[Battle]:
        with self.database.open() as db:
            rows = db.execute(SELECT_BATTLES + where, values).fetchall()
        return map(_battle, rows)

    # ------------------------------------------------------------ votes

    def vote(self, battle_id: str, token: str, voter: str, outcome: str) -> None:
        """Store a person's vote on their own battle; only the first vote counts.

        `token` is the random text on the battle's page that proves that the vote came from it. `outcome` is
        "a", "b", "tie" or "bad".

        Raises Refused for another person's battle, and for a battle that cannot be voted on.
        """
        battle = self.battle(battle_id)
        if battle.voter != voter or not hmac.compare_digest(token.encode(), battle.token.encode()):
            raise Refused("stranger", 403)
        if outcome not in OUTCOMES or not battle.answers or battle.leak:
            raise Refused("early", 409)
        if not battle.outcome:
            self._cast(battle_id, voter, False, outcome)

    def judge(self, battle_id: str, judge: str, outcome: str) -> None:
        """Store the vote of the model `judge` on a battle.

        `outcome` is as in `vote`; an empty one is an abstention.
        """
        self._cast(battle_id, judge, True, outcome)

    def unjudged(self, judge: str) -> list[Battle]:
        """Return the battles that people have voted on and this judge has not.

        They are in the order of the people's votes. Battles in which the judge itself takes part are left
        out.
        """
        where = (
            "WHERE votes.outcome <> '' AND ? NOT IN (battles.a, battles.b) AND battles.id NOT IN "
            "(SELECT battle FROM votes WHERE judge = 1 AND voter = ?) ORDER BY votes.number"
        )
        return list(self._battles(where, judge, judge))

    def __len__(self) -> int:
        with self.database.open() as db:
            return db.execute("SELECT count(*) FROM votes").fetchone()[0]

    def votes(self) -> list[Vote]:
        """Return all votes in the order in which they were cast.

        If a model's name stood for several weights, the name in the votes is followed by that of the weights.
        """
        with self.database.open() as db:
            rows = db.execute(f"{SELECT_VOTES} ORDER BY votes.number").fetchall()
        names = _unique_names(rows)
        return [_vote(row, names) for row in rows]

    def between(self, champion: str, candidate: str) -> list[int]:
        """Return people's votes on two models, given by the names of their weights: 1 where the candidate
        won, 0 for a tie, -1 where it lost."""
        where = "WHERE votes.judge = 0 AND (battles.a_from, battles.b_from) IN (VALUES (?, ?), (?, ?)) "
        where += "ORDER BY votes.number"
        with self.database.open() as db:
            rows = db.execute(SELECT_VOTES + where, (champion, candidate, candidate, champion)).fetchall()
        results = {"a": 1, "b": -1}
        sides = [1 if row["a_from"] == candidate else -1 for row in rows]
        return [side * results.get(row["outcome"], 0) for side, row in zip(sides, rows, strict=True)]

    def preferences(self, judge: str = "") -> Iterator[dict[str, Any]]:
        """Yield preference rows with TRL's columns, from the votes of people, or of `judge` if it is given.

        The columns `chosen` and `rejected` hold the answers alone; the thoughts, which voters do not see, are
        separate columns. Ties and pairs of equal answers are left out.
        """
        where = "WHERE votes.outcome IN ('a', 'b') AND votes.judge = ? ORDER BY votes.number"
        with self.database.open() as db:
            rows = db.execute(SELECT_VOTES + where, (int(bool(judge)),)).fetchall()
        for row in rows:
            if judge and row["voter"] != judge:
                continue
            preference = _preference(row)
            if preference["chosen"].strip() != preference["rejected"].strip():
                yield preference

    def broken(self) -> int | None:
        """Return the number of the first vote whose seal or number is wrong, None if all are right.

        Votes are numbered from 1.
        """
        seal = ""
        with self.database.open() as db:
            rows = db.execute(f"{SELECT_VOTES} ORDER BY votes.number")
            for expected, row in enumerate(rows, 1):
                in_order = row["number"] == expected
                if not in_order or not hmac.compare_digest(row["seal"], self._seal(seal, row)):
                    return expected
                seal = row["seal"]
        return None

    def _cast(self, battle_id: str, voter: str, judge: bool, outcome: str) -> None:
        """Append a sealed vote to the chain.

        The database ignores a second vote of a person on a battle, and a second one of the same judge.
        """
        with self.database.open() as db:
            last = db.execute("SELECT number, seal FROM votes ORDER BY number DESC LIMIT 1").fetchone()
            battle = db.execute(
                "SELECT battles.*, answers.a AS said_a, answers.b AS said_b "
                "FROM battles JOIN answers ON answers.battle = battles.id WHERE id = ?",
                (battle_id,),
            ).fetchone()
            vote = {
                "number": last["number"] + 1 if last else 1,
                "battle": battle_id,
                "voter": voter,
                "judge": int(judge),
                "outcome": outcome,
                "made": time.time(),
            }
            seal = self._seal(last["seal"] if last else "", {**dict(battle), **vote})
            db.execute("INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?, ?, ?, ?)", [*vote.values(), seal])

    def _seal(self, previous: str, vote: sqlite3.Row | Mapping[str, Any]) -> str:
        """Return the seal of a vote.

        It is an HMAC over the seal of the previous vote and the content of this one.
        """
        content = [previous, *(vote[column] for column in SEALED_COLUMNS)]
        return hmac.new(self.secret, _json(content).encode(), hashlib.sha256).hexdigest()


def _insert_battle(db: sqlite3.Connection, battle: Battle, now: float) -> None:
    row = asdict(battle)
    for name in ("answers", "leak", "outcome"):
        del row[name]
    row["made"] = now
    row["wish"] = json.dumps(row.pop("options"))
    columns = ", ".join(row)
    marks = ", ".join("?" * len(row))
    db.execute(f"INSERT INTO battles ({columns}) VALUES ({marks})", list(row.values()))


def _battle(row: sqlite3.Row) -> Battle:
    answers = ()
    if row["said_a"]:
        answers = tuple(Answer(**json.loads(row[side])) for side in ("said_a", "said_b"))
    return Battle(
        row["id"],
        row["token"],
        row["voter"],
        row["prompt"],
        row["language"],
        row["origin"],
        row["a"],
        row["b"],
        row["a_from"],
        row["b_from"],
        row["seed"],
        json.loads(row["wish"]),
        answers,
        row["leak"] or "",
        row["outcome"] or "",
    )


def _vote(row: sqlite3.Row, names: Mapping[tuple[str, str], str]) -> Vote:
    return Vote(
        names[row["a"], row["a_from"]],
        names[row["b"], row["b_from"]],
        row["outcome"],
        row["voter"],
        bool(row["judge"]),
        row["language"],
        tuple(json.loads(row["style"])),
        row["battle"],
        None if row["judge"] else row["made"] - row["ready"],
        row["made"],
    )


def _preference(row: sqlite3.Row) -> dict[str, Any]:
    """Return the preference row of a vote whose outcome is "a" or "b"."""
    chosen = row["outcome"]
    rejected = "b" if chosen == "a" else "a"
    chosen_answer = json.loads(row[f"said_{chosen}"])
    rejected_answer = json.loads(row[f"said_{rejected}"])
    return {
        "id": f"arena/{row['battle']}",
        "prompt": row["prompt"],
        "chosen": chosen_answer["text"],
        "rejected": rejected_answer["text"],
        "chosen_reasoning": chosen_answer["thought"],
        "rejected_reasoning": rejected_answer["thought"],
        "language": row["language"],
        "origin": {
            "battle": row["battle"],
            "judge" if row["judge"] else "voter": row["voter"],
            "problem": row["origin"],
            "chosen_model": {"name": row[chosen], "from": row[f"{chosen}_from"]},
            "rejected_model": {"name": row[rejected], "from": row[f"{rejected}_from"]},
        },
    }


def _unique_names(rows: Sequence[sqlite3.Row]) -> dict[tuple[str, str], str]:
    """Return a unique name for each pair (model, source), where the source is the name of the weights.

    It is the model's name, followed by the source in parentheses if the model had several sources.
    """
    models = {(row[side], row[f"{side}_from"]) for row in rows for side in ("a", "b")}
    names = [name for name, _ in models]
    return {
        (name, origin): name if names.count(name) == 1 else f"{name} ({origin})" for name, origin in models
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
