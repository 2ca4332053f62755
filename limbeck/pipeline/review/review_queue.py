"""Reviews of the rows in a queue. Several people may review a row; the rules below decide which verdict
counts.

A queue is a folder with `queue.jsonl` (the rows to review, written once) and `reviews.jsonl` (one event per
line, only ever appended to):

    {"id", "verdict": accept | edit | reject, "completion"?, "reason"?, "reviewer", "at", "seconds"?}
    {"id", "verdict": "undo", "reviewer", "at"}        takes back the reviewer's own last event on a row
    {"second": 0.2, "by", "at"}                        from here on this share of all rows needs two reviewers

A reviewer has one verdict per row, the last one given. A row is settled if it has enough verdicts and all
lead to the same text, or all reject it. If they differ, the row is disputed until a reviewer adds a verdict
with `"resolves": true`. That verdict counts, whatever verdicts follow, until its author takes it back.
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

QUEUES = ".queues"  # folder in the store
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
EXPORTED_KEYS = ("reviewer", "verdict", "completion", "reason")  # keys of a disputed row's verdicts


@dataclass(frozen=True)
class ReviewState:
    """A row with its verdicts: `ReviewState(3, {"id": ...}, 2, {"Ada": {"verdict": "accept"}})` needs another
    reviewer.

    `number` is the row's place in the queue, from 1. `wanted` is the number of reviewers that the row needs.
    `verdicts` maps reviewers to their verdicts, in the order given. `resolution` is the verdict that settled
    a dispute, if any.
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
        """`open` (no verdict), `second` (needs another reviewer), `disputed` (verdicts differ) or
        `settled`."""
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
        """The reviewers who gave the verdict that counts: the one who settled a dispute, or all who
        agreed."""
        if self.resolution:
            return [self.resolution["reviewer"]]
        return list(self.verdicts)

    def due(self, reviewer: str) -> bool:
        """Return True if the row needs more verdicts and this reviewer has given none."""
        return self.state in ("open", "second") and reviewer not in self.verdicts


def outcome(row: Mapping[str, Any], verdict: Mapping[str, Any]) -> str | None:
    """Return the response text that a verdict leaves, with each run of white space as one space; None if it
    rejects the row."""
    if verdict["verdict"] == "reject":
        return None
    text = verdict["completion"] if verdict["verdict"] == "edit" else row["completion"]
    return " ".join(text.split())


# ---------------------------------------------------------------- reading


def queue_folder(store: Path, digest: str) -> Path:
    """Return the folder of the queue for an artifact's rows. `digest` is the artifact's digest."""
    return store / QUEUES / digest[:16]


def review_states(queue: Path, review_bytes: int | None = None) -> Sequence[ReviewState]:
    """Return the review state of every row, in the queue's order. Only events in the first `review_bytes`
    bytes of the review file count; None counts all."""
    return _review_states(queue, _stamp(queue / QUEUE), _stamp(queue / REVIEWS), review_bytes)


@lru_cache(maxsize=16)
def _review_states(
    queue: Path, queue_stamp: object, reviews_stamp: object, review_bytes: int | None
) -> Sequence[ReviewState]:
    """Compute the review states. The stamps of the queue file and the review file serve as cache keys,
    because a run reads the states several times a second."""
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
    """Apply one event to the verdicts on its row (reviewer -> verdict) and to the resolutions of all rows (id
    -> verdict)."""
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
    """Return True if the row is in the share of rows that two people review. The rows of a smaller share are
    all contained in a larger one."""
    return fingerprint("second", row_id) < share * 2**63


def events(queue: Path, review_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the events in the first `review_bytes` bytes of the review file; None reads all. An incomplete
    last line is left out."""
    path = queue / REVIEWS
    if not path.exists():
        return []
    lines = path.read_bytes()[:review_bytes].split(b"\n")[:-1]
    return [{"reviewer": SOMEBODY, **json.loads(line)} for line in lines]


def second_share(queue: Path) -> float:
    """Return the share of rows, 0 to 1, that two people review."""
    share = 0.0
    for event in events(queue):
        share = event.get("second", share)
    return share


def queued_rows(queue: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a queue by their ids, in the queue's order."""
    stamp = _stamp(queue / QUEUE)
    return _queued_rows(queue, stamp) if stamp else {}


@lru_cache(maxsize=8)
def _queued_rows(queue: Path, stamp: object) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read(queue / QUEUE)}


def pending(queue: Path) -> list[dict[str, Any]]:
    """Return the rows whose review is not settled, in the queue's order."""
    return [state.row for state in review_states(queue) if state.state != "settled"]


def complete(queue: Path) -> bool:
    """Return True if the queue has been written and the review of every row is settled."""
    return (queue / QUEUE).exists() and not pending(queue)


def extent(queue: Path) -> int:
    """Return the size of the review file in bytes, without an incomplete last line."""
    path = queue / REVIEWS
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def digest(queue: Path, review_bytes: int) -> str:
    """Return the SHA-256 of the first `review_bytes` bytes of the review file."""
    return hashlib.sha256((queue / REVIEWS).read_bytes()[:review_bytes]).hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return the modification time (ns) and the size (bytes) of a file, which identify its version; None if
    it does not exist."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size


# ---------------------------------------------------------------- writing


def review(queue: Path, entry: dict[str, Any]) -> None:
    """Append one verdict, which is on disk when this returns. Raises LimbeckError if the verdict is not valid
    for the queue."""
    check(entry, queued_rows(queue), f"review of {entry.get('id')}")
    append(queue, [entry])


def undo(queue: Path, row_id: str, reviewer: str) -> None:
    """Take back a reviewer's last verdict on a row. Raises LimbeckError if the queue has no such row."""
    if row_id not in queued_rows(queue):
        raise LimbeckError(f"review of {row_id}: the queue has no such row")
    append(queue, [{"id": row_id, "verdict": "undo", "reviewer": reviewer}])


def set_second_share(queue: Path, share: float, by: str) -> None:
    """Set the share of rows, 0 to 1, that two people review from now on. `by` is the name of whoever sets it.
    Raises LimbeckError if it is not between 0 and 1."""
    if not 0 <= share <= 1:
        raise LimbeckError(f"second: {share} is no share; give a number between 0 and 1")
    append(queue, [{"second": share, "by": by}])


def check(entry: Mapping[str, Any], rows: Mapping[str, dict[str, Any]], where: str) -> None:
    """Raise LimbeckError for a verdict that is not valid: an unknown row or verdict, an edit without text, or
    an accepted row with a changed text. `where` begins the error message."""
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
    """Append the verdicts of a JSONL file that was filled in outside of Limbeck, and return their number.
    `reviewer` is the name for verdicts that have none.

    Rows whose verdict is null are skipped and stay open. If any line is not valid, nothing is appended, and
    LimbeckError with the line's number is raised.
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
    """Return the rows that a reviewer may fill in outside of Limbeck. First come the rows that still need
    this reviewer's verdict, without the verdicts of others; then the disputed rows with all verdicts, for the
    reviewer to settle."""
    everything = review_states(queue)
    rows = [{**state.row, "verdict": None} for state in everything if state.due(reviewer)]
    for state in everything:
        if state.state != "disputed":
            continue
        verdicts = []
        for verdict in state.verdicts.values():
            verdicts.append({key: verdict[key] for key in EXPORTED_KEYS if key in verdict})
        rows.append({**state.row, "verdict": None, "resolves": True, "verdicts": verdicts})
    return rows


def append(queue: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Append events to the review file under a lock; they are on disk when this returns. An incomplete last
    line, as a power cut or a full disk leaves it, is removed first."""
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
    """Return True if the file is empty or its last line is complete."""
    if file.tell() == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
