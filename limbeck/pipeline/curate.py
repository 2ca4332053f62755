"""The human queue: rows go out to people, verdicts come back. A stated policy can stand in for them.

A queue is a folder with `queue.jsonl` (what is asked) and `reviews.jsonl` (append-only: one verdict a line,
the last one of a row counts). It belongs to the rows' content, so that no review is lost when a recipe changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..record import read
from ..types import LimbeckError, Task
from .store import write

QUEUE, REVIEWS = "queue.jsonl", "reviews.jsonl"
VERDICTS = ("accept", "edit", "reject")


class Waiting(Exception):
    """Rows wait for people; the stage goes on by itself when all have been reviewed."""

    def __init__(self, open_rows: int, queue: Path):
        super().__init__(f"{open_rows} rows wait for a person")
        self.open_rows, self.queue = open_rows, queue


def ask(queue: Path, rows: list[dict[str, Any]], question: str) -> None:
    """Lay the rows out for review, each once: a problem that was drawn twice was answered alike."""
    queue.mkdir(parents=True, exist_ok=True)
    if not (queue / QUEUE).exists():
        write_rows(queue / QUEUE, [{"question": question, **row} for row in {row["id"]: row for row in rows}.values()])


def reviews(queue: Path) -> dict[str, dict[str, Any]]:
    """The standing verdict of each reviewed row."""
    return {review["id"]: review for review in read(queue / REVIEWS)}


def pending(queue: Path) -> list[dict[str, Any]]:
    """Rows without a verdict, in order."""
    done = reviews(queue)
    return [row for row in read(queue / QUEUE) if row["id"] not in done]


def review(queue: Path, entry: dict[str, Any]) -> None:
    """Append one verdict: `{"id", "verdict": accept|edit|reject, "completion"?, "reason"?, "reviewer"}`."""
    check(entry, asked(queue), f"review of {entry.get('id')}")
    _append(queue, [entry])


def asked(queue: Path) -> dict[str, dict[str, Any]]:
    """The rows of a queue by their id."""
    return {row["id"]: row for row in read(queue / QUEUE)}


def check(entry: dict[str, Any], rows: dict[str, dict[str, Any]], where: str) -> None:
    """Refuse a verdict that could not be carried out; `where` begins the sentence."""
    row, verdict, text = rows.get(entry.get("id")), entry.get("verdict"), entry.get("completion")
    if row is None:
        raise LimbeckError(f"{where}: the queue has no row {entry.get('id')!r}; leave the ids as they were exported")
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
            raise LimbeckError(f"{where}: not valid JSON; mend it and import again, nothing was taken over") from None
        if not isinstance(entry, dict):
            raise LimbeckError(f"{where}: not a JSON object; write one {{...}} a line, as exported")
        if entry.get("verdict") is not None:
            check(entry, rows, where)
            entries.append({k: entry[k] for k in ("id", "verdict", "completion", "reason", "reviewer") if k in entry})
    _append(queue, [{"reviewer": reviewer, **entry} for entry in entries])
    return len(entries)


def _append(queue: Path, entries: list[dict[str, Any]]) -> None:
    """On disk when this returns; a line that a power cut or a full disk tore is dropped first."""
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
    with open(queue / REVIEWS, "ab+") as file:
        file.seek(0)
        held = file.read()
        if not held.endswith(b"\n"):
            file.truncate(held.rfind(b"\n") + 1)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def by_people(rows: list[dict[str, Any]], queue: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows as people left them; raises `Waiting` while any has no verdict."""
    left = pending(queue)
    if left or not (queue / QUEUE).exists():
        raise Waiting(len(left), queue)
    kept, verdicts = [], reviews(queue)
    counts = dict.fromkeys(VERDICTS, 0)
    for row in rows:
        verdict = verdicts[row["id"]]
        counts[verdict["verdict"]] += 1
        if verdict["verdict"] == "reject":
            continue
        text = verdict["completion"] if verdict["verdict"] == "edit" else row["completion"]
        kept.append(edited(row, text, verdict.get("reviewer", "somebody")))
    names = sorted({v.get("reviewer", "somebody") for v in verdicts.values()})
    notes = {"policy": "people", "reviewers": names, "accepted": counts["accept"], "edited": counts["edit"]}
    return kept, {**notes, "rejected": counts["reject"]}


def by_policy(rows: list[dict[str, Any]], policy: str, tasks: dict[str, Task]) -> tuple[list[dict], dict[str, Any]]:
    """`accept` keeps every row; `translate` also rewrites each thought in its question's language, where the
    task knows how to."""
    kept, changed = [], 0
    for row in rows:
        task = tasks.get(row["id"].split("/")[0])
        if policy == "translate" and hasattr(task, "rewrite"):
            thought = task.rewrite(row["reasoning_content"], row["language"])
            changed += thought != row["reasoning_content"]
            kept.append(edited(row, f"<think> {thought} </think> {row['content']}", "policy: translate"))
        else:
            kept.append(row)
    return kept, {"policy": policy, "accepted": len(rows) - changed, "edited": changed, "rejected": 0}


def edited(row: dict[str, Any], text: str, editor: str) -> dict[str, Any]:
    """The row with its new text; sampled ids stay only where the text did."""
    from ..tokenizer import split_thought

    origin = {**row["origin"], "editor": editor}
    if text.split() == row["completion"].split():
        return {**row, "origin": origin}
    thought = split_thought(text)
    kept = {k: v for k, v in row.items() if k != "tokens"}
    return {**kept, "completion": text, "reasoning_content": thought.thought, "content": thought.answer, "origin": origin}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
