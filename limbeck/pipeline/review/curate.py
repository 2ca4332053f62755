"""The curate stage: rows go out to reviewers and come back with verdicts. A policy can decide instead of
people.

A queue belongs to the rows' content, so that no review is lost when a recipe changes; `reviews.py` describes
its files.
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
from .reviews import QUEUE, VERDICTS, ReviewState, events, review_states, set_second_share

RECIPE = "the recipe"  # the author of the share of rows that two people review


class Waiting(Exception):
    """Rows wait for reviewers; the stage goes on when all have been reviewed."""

    def __init__(self, open_rows: int, queue: Path):
        super().__init__(f"{open_rows} rows wait for a person")
        self.open_rows = open_rows
        self.queue = queue


def ask(
    queue: Path, rows: Callable[[], list[dict[str, Any]]], question: str, second: float | None = None
) -> None:
    """Write the queue, each id once: a problem that was drawn twice was answered alike.

    `second`, the share of rows that two people review, is recorded when it changes: a share that people
    choose afterwards counts until the recipe's changes.
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
    """The rows that the first `review_bytes` bytes of reviews leave, and notes on the reviews.

    Raises `Waiting` while any row is open.
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
    """The rows that a policy leaves, and notes. `accept` keeps every row; `translate` also rewrites each
    thought in its question's language, if the task can."""
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
    """The row with a new text and the name of its editor; sampled token ids stay only if the text did."""
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
    """Write rows as JSONL, whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write(path, "".join(lines))
