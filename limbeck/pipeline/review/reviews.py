"""Reviews of the rows in a queue: several people may review a row, and the rules below decide which verdict
counts.

A queue is a folder with `queue.jsonl` (the rows to review, written once) and `reviews.jsonl` (append-only, a
line an event):

    {"id", "verdict": accept | edit | reject, "completion"?, "reason"?, "reviewer", "at", "seconds"?}
    {"id", "verdict": "undo", "reviewer", "at"}        takes back the reviewer's own last event on a row
    {"second": 0.2, "by", "at"}                        from here on this share of all rows needs two reviewers

A reviewer has one verdict a row, the last one given. All verdicts on a row must lead to the same text, or to
none: where they do not, the row stays open until a reviewer settles it with a verdict that also has
`"resolves": true`. That one counts, whatever verdicts follow, until its author takes it back.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...run_log import read
from ...types import LimbeckError, fingerprint

QUEUES = ".queues"  # in the store
QUEUE = "queue.jsonl"
REVIEWS = "reviews.jsonl"
VERDICTS = ("accept", "edit", "reject")
SOMEBODY = "somebody"  # the reviewer of a verdict without a name
IMPORTED_KEYS = (
    "id",
    "verdict",
    "completion",
    "reason",
    "reviewer",
    "resolves",
    "seconds",
)  # others are ignored
EXPORTED_KEYS = ("reviewer", "verdict", "completion", "reason")  # of the verdicts on a disputed row


@dataclass(frozen=True)
class ReviewState:
    """A row with its verdicts: `ReviewState(3, {"id": ...}, 2, {"Ada": {"verdict": "accept"}})` needs a second
    reviewer.

    `number` counts the queue's rows from 1, `wanted` is the number of reviewers that the row needs,
    `verdicts` maps reviewers to their verdicts in order. `resolution` is the verdict that settles a dispute.
    """

    number: int
    row: dict[str, Any]
    wanted: int = 1
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    resolution: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        """The row's id."""
        return self.row["id"]

    @property
    def state(self) -> str:
        """`open`, `second` (needs another reviewer), `disputed` or `settled`."""
        if self.resolution:
            return "settled"
        outcomes = {outcome(self.row, verdict) for verdict in self.verdicts.values()}
        if len(outcomes) > 1:
            return "disputed"
        if len(self.verdicts) >= self.wanted:
            return "settled"
        return "second" if self.verdicts else "open"

    @property
    def verdict(self) -> dict[str, Any] | None:
        """The verdict that counts; None unless the row is settled."""
        if self.state != "settled":
            return None
        return self.resolution or next(iter(self.verdicts.values()))

    @property
    def people(self) -> list[str]:
        """The reviewers behind the verdict that counts: the one who resolved, or all who agreed."""
        if self.resolution:
            return [self.resolution["reviewer"]]
        return list(self.verdicts)

    def due(self, reviewer: str) -> bool:
        """True if the row still needs this reviewer's verdict."""
        return self.state in ("open", "second") and reviewer not in self.verdicts


def outcome(row: Mapping[str, Any], verdict: Mapping[str, Any]) -> str | None:
    """The text that a verdict leaves, with blanks normalized; None for a rejected row."""
    if verdict["verdict"] == "reject":
        return None
    text = verdict["completion"] if verdict["verdict"] == "edit" else row["completion"]
    return " ".join(text.split())


# ---------------------------------------------------------------- reading


def queue_folder(store: Path, digest: str) -> Path:
    """The queue for the rows of an artifact, by the artifact's digest."""
    return store / QUEUES / digest[:16]


def review_states(queue: Path, review_bytes: int | None = None) -> Sequence[ReviewState]:
    """Every row in order, with its verdicts in the first `review_bytes` bytes, by default in all."""
    return _standings(queue, _stamp(queue / QUEUE), _stamp(queue / REVIEWS), review_bytes)


@lru_cache(maxsize=16)
def _standings(
    queue: Path, queue_stamp: object, reviews_stamp: object, review_bytes: int | None
) -> Sequence[ReviewState]:
    """The stamps stand for the content of the two files, which a run reads several times a second."""
    verdicts: dict[str, dict[str, dict]] = {}
    resolutions: dict[str, dict] = {}
    share = 0.0
    for event in events(queue, review_bytes):
        if "second" in event:
            share = event["second"]
        if "verdict" in event:
            _apply(event, verdicts.setdefault(event["id"], {}), resolutions)
    states = []
    for number, (row_id, row) in enumerate(queued_rows(queue).items(), 1):
        wanted = 2 if needs_second(row_id, share) else 1
        states.append(ReviewState(number, row, wanted, verdicts.get(row_id, {}), resolutions.get(row_id)))
    return tuple(states)


def _apply(event: dict[str, Any], verdicts: dict[str, dict], resolutions: dict[str, dict]) -> None:
    """Apply one event to the verdicts on its row by reviewer, and to the resolutions by row."""
    row = event["id"]
    reviewer = event["reviewer"]
    if event["verdict"] == "undo":
        if row in resolutions and resolutions[row]["reviewer"] == reviewer:
            del resolutions[row]
        else:
            verdicts.pop(reviewer, None)
    elif event.get("resolves"):
        resolutions[row] = event
    else:
        verdicts.pop(reviewer, None)  # so that the last verdict given comes last
        verdicts[reviewer] = event


def needs_second(row_id: str, share: float) -> bool:
    """True if a row is in the share that two people review; larger shares contain smaller ones."""
    return fingerprint("second", row_id) < share * 2**63


def events(queue: Path, review_bytes: int | None = None) -> list[dict[str, Any]]:
    """The events in the first `review_bytes` bytes, by default in all; without a torn last line."""
    path = queue / REVIEWS
    if not path.exists():
        return []
    lines = path.read_bytes()[:review_bytes].split(b"\n")[:-1]
    return [{"reviewer": SOMEBODY, **json.loads(line)} for line in lines]


def second_share(queue: Path) -> float:
    """The share of rows that two people review."""
    share = 0.0
    for event in events(queue):
        share = event.get("second", share)
    return share


def queued_rows(queue: Path) -> dict[str, dict[str, Any]]:
    """The rows of a queue by their id."""
    stamp = _stamp(queue / QUEUE)
    return _queued_rows(queue, stamp) if stamp else {}


@lru_cache(maxsize=8)
def _queued_rows(queue: Path, stamp: object) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read(queue / QUEUE)}


def pending(queue: Path) -> list[dict[str, Any]]:
    """Rows whose review is not settled, in the queue's order."""
    return [standing.row for standing in review_states(queue) if standing.state != "settled"]


def complete(queue: Path) -> bool:
    """True if the queue has been written and every row is settled."""
    return (queue / QUEUE).exists() and not pending(queue)


def extent(queue: Path) -> int:
    """The size of the reviews in bytes, without a torn last line."""
    path = queue / REVIEWS
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def digest(queue: Path, review_bytes: int) -> str:
    """SHA-256 of the first `review_bytes` bytes of reviews."""
    return hashlib.sha256((queue / REVIEWS).read_bytes()[:review_bytes]).hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    """Time of change and size of a file, which tell its versions apart; None if there is none."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size


# ---------------------------------------------------------------- writing


def review(queue: Path, entry: dict[str, Any]) -> None:
    """Append one verdict; it is on disk when this returns. LimbeckError if it could not be carried out."""
    check(entry, queued_rows(queue), f"review of {entry.get('id')}")
    append(queue, [entry])


def undo(queue: Path, row_id: str, reviewer: str) -> None:
    """Take back a reviewer's last event on a row. LimbeckError if the queue has no such row."""
    if row_id not in queued_rows(queue):
        raise LimbeckError(f"review of {row_id}: the queue has no such row")
    append(queue, [{"id": row_id, "verdict": "undo", "reviewer": reviewer}])


def set_second_share(queue: Path, share: float, by: str) -> None:
    """From now on two people review this share of the rows. LimbeckError unless it is between 0 and 1."""
    if not 0 <= share <= 1:
        raise LimbeckError(f"second: {share} is no share; give a number between 0 and 1")
    append(queue, [{"second": share, "by": by}])


def check(entry: Mapping[str, Any], rows: Mapping[str, dict[str, Any]], where: str) -> None:
    """Raise LimbeckError for a verdict that could not be carried out; `where` begins its sentence."""
    row = rows.get(entry.get("id"))
    verdict = entry.get("verdict")
    text = entry.get("completion")
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
    """Append the verdicts of a JSONL file that was filled in elsewhere, all or none; return their number.

    Rows whose verdict is still null stay open. Raises LimbeckError, naming the line, for one that is not
    valid.
    """
    rows = queued_rows(queue)
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        entry = _parse(line, where)
        if entry.get("verdict") is not None:
            check(entry, rows, where)
            verdict = {key: entry[key] for key in IMPORTED_KEYS if key in entry}
            entries.append({"reviewer": reviewer, **verdict})
    append(queue, entries)
    return len(entries)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        raise LimbeckError(
            f"{where}: not valid JSON; mend it and import again, nothing was taken over"
        ) from None
    if not isinstance(entry, dict):
        raise LimbeckError(f"{where}: not a JSON object; write one {{...}} a line, as exported")
    return entry


def export_rows(queue: Path, reviewer: str) -> list[dict[str, Any]]:
    """The rows that a reviewer may fill in elsewhere: first those due, without the verdicts of others; then
    the disputed ones, with the verdicts, to be resolved."""
    everything = review_states(queue)
    rows = [{**standing.row, "verdict": None} for standing in everything if standing.due(reviewer)]
    for standing in everything:
        if standing.state != "disputed":
            continue
        verdicts = []
        for verdict in standing.verdicts.values():
            verdicts.append({key: verdict[key] for key in EXPORTED_KEYS if key in verdict})
        rows.append({**standing.row, "verdict": None, "resolves": True, "verdicts": verdicts})
    return rows


def append(queue: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Append events; they are on disk when this returns, whatever other processes write. A last line that a
    power cut or a full disk tore is dropped first."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    lines = [json.dumps({**entry, "at": now}, ensure_ascii=False) + "\n" for entry in entries]
    with FileLock(queue / f"{REVIEWS}.lock"), open(queue / REVIEWS, "ab+") as file:
        if not _ends_whole(file):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(lines).encode())
        file.flush()
        os.fsync(file.fileno())


def _ends_whole(file: Any) -> bool:
    """True for an empty file, or one whose last line is whole."""
    if file.tell() == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
