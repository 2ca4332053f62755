"""What people said about the rows of a queue: several may speak, and it is clear whose word stands.

A queue is a folder with `queue.jsonl` (what is asked, written once) and `reviews.jsonl` (append-only, a line an event):

    {"id", "verdict": accept | edit | reject, "completion"?, "reason"?, "reviewer", "at", "seconds"?}
    {"id", "verdict": "undo", "reviewer", "at"}        takes back one's own last word on a row
    {"second": 0.2, "by", "at"}                        from here on this share of all rows needs two people

A person has one verdict a row, the last one given. All of a row's verdicts must lead to the same text, or to none: where
they do not, the row stays open until somebody settles it with a verdict that also says `"resolves": true`. That one
stands, whatever is said later, until its author takes it back.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...run_log import read
from ...types import LimbeckError, fingerprint

QUEUE, REVIEWS = "queue.jsonl", "reviews.jsonl"
VERDICTS = ("accept", "edit", "reject")
TOLD = ("id", "verdict", "completion", "reason", "reviewer", "resolves", "seconds")  # what an import may say
SOMEBODY = "somebody"  # who gave a verdict without a name


@dataclass(frozen=True)
class Standing:
    """A row and what was said of it: `Standing(3, {"id": ...}, 2, {"Ada": {"verdict": "accept"}})` waits for a second person.

    `number` counts the queue's rows from 1, `wanted` is how many people must see the row, `verdicts` are theirs in order.
    """

    number: int
    row: dict[str, Any]
    wanted: int = 1
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    resolution: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return self.row["id"]

    @property
    def state(self) -> str:
        """`open`, `second` (waits for another person), `disputed` or `settled`."""
        if self.resolution:
            return "settled"
        if len({outcome(self.row, entry) for entry in self.verdicts.values()}) > 1:
            return "disputed"
        return ("second" if self.verdicts else "open") if len(self.verdicts) < self.wanted else "settled"

    @property
    def verdict(self) -> dict[str, Any] | None:
        """The verdict that stands, if the row is settled."""
        if self.state != "settled":
            return None
        return self.resolution or next(iter(self.verdicts.values()))

    @property
    def people(self) -> list[str]:
        """Whose word stands: who resolved, or all who agreed."""
        return [self.resolution["reviewer"]] if self.resolution else list(self.verdicts)

    def due(self, reviewer: str) -> bool:
        """Whether this person is still to be asked."""
        return self.state in ("open", "second") and reviewer not in self.verdicts


def outcome(row: dict[str, Any], entry: dict[str, Any]) -> str | None:
    """The text that a verdict leaves, blanks aside; None if it leaves none."""
    if entry["verdict"] == "reject":
        return None
    return " ".join((entry["completion"] if entry["verdict"] == "edit" else row["completion"]).split())


# ---------------------------------------------------------------- reading


def standings(queue: Path, said: int | None = None) -> Sequence[Standing]:
    """Every row in order, as it stands after the first `said` bytes of reviews, by default all."""
    stamps = [(s.st_mtime_ns, s.st_size) if (s := _stat(queue / name)) else None for name in (QUEUE, REVIEWS)]
    return _standings(queue, stamps[0], stamps[1], said)


@lru_cache(maxsize=16)
def _standings(queue: Path, asked_at: object, said_at: object, said: int | None) -> Sequence[Standing]:
    """The stamps say which state of the two files is meant: a run looks several times a second, and rows are long."""
    rows, log = asked(queue), events(queue, said)
    share = next((event["second"] for event in reversed(log) if "second" in event), 0.0)
    verdicts: dict[str, dict[str, dict]] = {}
    resolutions: dict[str, dict] = {}
    for event in log:
        if "verdict" not in event:
            continue
        name, own = event["reviewer"], verdicts.setdefault(event["id"], {})
        if event["verdict"] == "undo":
            if event["id"] in resolutions and resolutions[event["id"]]["reviewer"] == name:
                del resolutions[event["id"]]
            else:
                own.pop(name, None)
        elif event.get("resolves"):
            resolutions[event["id"]] = event
        else:
            own.pop(name, None)
            own[name] = event
    return tuple(
        Standing(number, row, 2 if twice(key, share) else 1, verdicts.get(key, {}), resolutions.get(key))
        for number, (key, row) in enumerate(rows.items(), 1)
    )


def twice(id: str, share: float) -> bool:
    """Whether a row belongs to the share that two people see; a larger share holds all of a smaller one."""
    return fingerprint("second", id) < share * 2**63


def events(queue: Path, said: int | None = None) -> list[dict[str, Any]]:
    """The lines of the reviews, or those that end within the first `said` bytes; a torn last one is left out."""
    path = queue / REVIEWS
    lines = path.read_bytes()[:said].split(b"\n")[:-1] if path.exists() else []
    return [{"reviewer": SOMEBODY, **json.loads(line)} for line in lines]


def second_share(queue: Path) -> float:
    """Which share of rows two people review."""
    return next((event["second"] for event in reversed(events(queue)) if "second" in event), 0.0)


def asked(queue: Path) -> dict[str, dict[str, Any]]:
    """The rows of a queue by their id."""
    stamp = _stat(queue / QUEUE)
    return _asked(queue, stamp.st_mtime_ns) if stamp else {}


@lru_cache(maxsize=8)
def _asked(queue: Path, stamp: int) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read(queue / QUEUE)}


def pending(queue: Path) -> list[dict[str, Any]]:
    """Rows whose review is not settled, in the queue's order."""
    return [standing.row for standing in standings(queue) if standing.state != "settled"]


def complete(queue: Path) -> bool:
    """Whether rows were asked about and none is open."""
    return (queue / QUEUE).exists() and all(standing.state == "settled" for standing in standings(queue))


def extent(queue: Path) -> int:
    """How many bytes of reviews there are; a torn last line is none."""
    path = queue / REVIEWS
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def digest(queue: Path, said: int) -> str:
    """SHA-256 of the first `said` bytes of reviews."""
    return hashlib.sha256((queue / REVIEWS).read_bytes()[:said]).hexdigest()


def _stat(path: Path) -> os.stat_result | None:
    return path.stat() if path.exists() else None


# ---------------------------------------------------------------- writing


def review(queue: Path, entry: dict[str, Any]) -> None:
    """Append one verdict; it is on disk when this returns. LimbeckError if it could not be carried out."""
    check(entry, asked(queue), f"review of {entry.get('id')}")
    append(queue, [entry])


def undo(queue: Path, id: str, reviewer: str) -> None:
    """Take back what this person said last of a row."""
    if id not in asked(queue):
        raise LimbeckError(f"review of {id}: the queue has no such row")
    append(queue, [{"id": id, "verdict": "undo", "reviewer": reviewer}])


def ask_twice(queue: Path, share: float, by: str) -> None:
    """From now on two people review this share of the rows, between 0 and 1."""
    if not 0 <= share <= 1:
        raise LimbeckError(f"second: {share} is no share; give a number between 0 and 1")
    append(queue, [{"second": share, "by": by}])


def check(entry: dict[str, Any], rows: dict[str, dict[str, Any]], where: str) -> None:
    """Refuse a verdict that could not be carried out; `where` begins the sentence."""
    row, verdict, text = rows.get(entry.get("id")), entry.get("verdict"), entry.get("completion")
    if row is None:
        raise LimbeckError(
            f"{where}: the queue has no row {entry.get('id')!r}; leave the ids as they were exported"
        )
    if verdict not in VERDICTS:
        raise LimbeckError(f"{where}: verdict {verdict!r} is none of {', '.join(VERDICTS)}")
    if verdict == "edit" and not (isinstance(text, str) and text.strip()):
        raise LimbeckError(f"{where}: an edit needs the edited text under completion")
    if verdict == "accept" and text not in (None, row["completion"]):
        raise LimbeckError(f"{where}: the completion was changed and accepted; call the verdict edit")


def import_reviews(queue: Path, path: Path, reviewer: str) -> int:
    """Verdicts from a JSONL file that somebody filled in elsewhere; all of them or none. Rows whose verdict is
    still null stay open."""
    entries, rows = [], asked(queue)
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except ValueError:
            raise LimbeckError(
                f"{where}: not valid JSON; mend it and import again, nothing was taken over"
            ) from None
        if not isinstance(entry, dict):
            raise LimbeckError(f"{where}: not a JSON object; write one {{...}} a line, as exported")
        if entry.get("verdict") is not None:
            check(entry, rows, where)
            entries.append({k: entry[k] for k in TOLD if k in entry})
    append(queue, [{"reviewer": reviewer, **entry} for entry in entries])
    return len(entries)


def export_rows(queue: Path, reviewer: str) -> list[dict[str, Any]]:
    """What this person may fill in elsewhere: the rows to be asked about, without what others said; and the rows on which
    others disagree, with it, to be resolved."""
    found = [{**s.row, "verdict": None} for s in standings(queue) if s.due(reviewer)]
    said = ("reviewer", "verdict", "completion", "reason")
    return found + [
        {
            **s.row,
            "verdict": None,
            "resolves": True,
            "verdicts": [{k: v[k] for k in said if k in v} for v in s.verdicts.values()],
        }
        for s in standings(queue)
        if s.state == "disputed"
    ]


def append(queue: Path, entries: Sequence[dict[str, Any]]) -> None:
    """On disk when this returns, whoever else writes; a line that a power cut or a full disk tore is dropped first."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = "".join(json.dumps({**entry, "at": now}, ensure_ascii=False) + "\n" for entry in entries).encode()
    with FileLock(queue / f"{REVIEWS}.lock"), open(queue / REVIEWS, "ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
