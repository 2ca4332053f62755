"""The curate stage: reviewers accept, edit or reject rows. A policy can decide in place of people.

A queue is a folder with rows for people to review and with their reviews. It is named after the content of
the rows, so that a change of the recipe loses no review. `review_queue.py` describes its files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...types import Task
from ..dataset_rows import source_of
from ..store import write
from .agreement import agreement
from .review_queue import QUEUE, VERDICTS, ReviewState, events, review_states, set_second_share

RECIPE = "the recipe"  # the author of the share of rows that two people review


class Waiting(Exception):
    """Raised while rows wait for reviewers. The stage can go on when all rows have been reviewed."""

    def __init__(self, open_rows: int, queue: Path):
        super().__init__(f"{open_rows} rows wait for a person")
        self.open_rows = open_rows
        self.queue = queue


def write_queue(
    queue: Path, rows: Callable[[], list[dict[str, Any]]], question: str, second: float | None = None
) -> None:
    """Write the rows to the queue for people to review, unless it exists already. Each id is written once:
    when a problem is drawn twice, its responses are the same.

    `rows` is called to get the rows, `question` is shown to the reviewers. `second` is the share of rows that
    two people review. It is recorded only when it differs from the last value that the recipe set, so that a
    share that people choose afterwards stays in force until the recipe's changes.
    """
    queue.mkdir(parents=True, exist_ok=True)
    if not (queue / QUEUE).exists():
        distinct = {row["id"]: row for row in rows()}
        write_rows(queue / QUEUE, [{"question": question, **row} for row in distinct.values()])
    shares = [event["second"] for event in events(queue) if event.get("by") == RECIPE]
    if second is not None and shares[-1:] != [second]:
        set_second_share(queue, second, RECIPE)


def apply_reviews(
    rows: list[dict[str, Any]], queue: Path, review_bytes: int | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return (the rows that the reviewers kept, edited where they edited them; notes on the reviews for the
    manifest).

    Only the first `review_bytes` bytes of the review file count; None counts all. Raises `Waiting` while the
    review of any row is not settled.
    """
    reviewed = {standing.id: standing for standing in review_states(queue, review_bytes)}
    still_open = sum(standing.state != "settled" for standing in reviewed.values())
    if still_open or not (queue / QUEUE).exists():
        raise Waiting(still_open, queue)
    counts = dict.fromkeys(VERDICTS, 0)
    kept = []
    for row in rows:
        standing = reviewed[row["id"]]
        verdict = standing.verdict
        counts[verdict["verdict"]] += 1
        if verdict["verdict"] == "reject":
            continue
        text = verdict["completion"] if verdict["verdict"] == "edit" else row["completion"]
        kept.append(edit_row(row, text, ", ".join(standing.people)))
    return kept, _notes(list(reviewed.values()), counts)


def _notes(reviewed: list[ReviewState], counts: dict[str, int]) -> dict[str, Any]:
    reviewers: set[str] = set()
    for standing in reviewed:
        reviewers.update(standing.people)
        reviewers.update(standing.verdicts)
    notes: dict[str, Any] = {
        "policy": "people",
        "reviewers": sorted(reviewers),
        "accepted": counts["accept"],
        "edited": counts["edit"],
        "rejected": counts["reject"],
    }
    resolved = sum(standing.resolution is not None for standing in reviewed)
    if resolved:
        notes["resolved"] = resolved
    return {**notes, **agreement(reviewed)}


def apply_policy(
    rows: list[dict[str, Any]], policy: str, tasks: dict[str, Task]
) -> tuple[list[dict], dict[str, Any]]:
    """Return (the rows that `accept` or `translate` keeps; notes for the manifest). Both keep every row;
    `translate` also rewrites each thought in the language of its question, if the row's task can. `tasks`
    maps problem sources to tasks."""
    kept = []
    changed = 0
    for row in rows:
        task = tasks.get(source_of(row["id"]))
        if policy == "translate" and hasattr(task, "rewrite"):
            thought = task.rewrite(row["reasoning_content"], row["language"])
            changed += thought != row["reasoning_content"]
            row = edit_row(row, f"<think> {thought} </think> {row['content']}", "policy: translate")
        kept.append(row)
    return kept, {"policy": policy, "accepted": len(rows) - changed, "edited": changed, "rejected": 0}


def edit_row(row: dict[str, Any], text: str, editor: str) -> dict[str, Any]:
    """Return a copy of the row with a new response text and the name of its editor. The sampled token ids are
    kept only if the text is the same but for white space."""
    from ...text.reasoning_parser import split_thought

    origin = {**row["origin"], "editor": editor}
    if text.split() == row["completion"].split():
        return {**row, "origin": origin}
    parts = split_thought(text)
    edited = {
        **row,
        "completion": text,
        "reasoning_content": parts.thought,
        "content": parts.answer,
        "origin": origin,
    }
    edited.pop("tokens", None)
    return edited


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows to a JSONL file, atomically."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write(path, "".join(lines))
