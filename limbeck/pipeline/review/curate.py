"""The human queue: rows go out to people, verdicts come back. A stated policy can stand in for them.

A queue belongs to the rows' content, so that no review is lost when a recipe changes; `reviews.py` says what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ...types import Task
from ..store import write
from .agreement import agreement
from .reviews import QUEUE, VERDICTS, ask_twice, events, standings

RECIPE = "the recipe"  # who set the share of rows that two people see


class Waiting(Exception):
    """Rows wait for people; the stage goes on by itself when all have been reviewed."""

    def __init__(self, open_rows: int, queue: Path):
        super().__init__(f"{open_rows} rows wait for a person")
        self.open_rows, self.queue = open_rows, queue


def ask(
    queue: Path, rows: Callable[[], list[dict[str, Any]]], question: str, second: float | None = None
) -> None:
    """Lay the rows out for review, each once: a problem that was drawn twice was answered alike. `second`, the share of
    rows that two people see, is said once: what people choose at the desk afterwards stands until the recipe changes."""
    queue.mkdir(parents=True, exist_ok=True)
    if not (queue / QUEUE).exists():
        write_rows(
            queue / QUEUE,
            [{"question": question, **row} for row in {row["id"]: row for row in rows()}.values()],
        )
    told = [event["second"] for event in events(queue) if event.get("by") == RECIPE]
    if second is not None and told[-1:] != [second]:
        ask_twice(queue, second, RECIPE)


def by_people(
    rows: list[dict[str, Any]], queue: Path, said: int | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows as people left them in the first `said` bytes of their reviews; raises `Waiting` while any is open."""
    standing = {one.id: one for one in standings(queue, said)}
    left = sum(one.state != "settled" for one in standing.values())
    if left or not (queue / QUEUE).exists():
        raise Waiting(left, queue)
    kept, counts = [], dict.fromkeys(VERDICTS, 0)
    for row in rows:
        verdict = standing[row["id"]].verdict
        counts[verdict["verdict"]] += 1
        if verdict["verdict"] == "reject":
            continue
        text = verdict["completion"] if verdict["verdict"] == "edit" else row["completion"]
        kept.append(edited(row, text, ", ".join(standing[row["id"]].people)))
    names = sorted({name for one in standing.values() for name in (*one.people, *one.verdicts)})
    notes = {
        "policy": "people",
        "reviewers": names,
        "accepted": counts["accept"],
        "edited": counts["edit"],
        "rejected": counts["reject"],
    }
    resolved = sum(one.resolution is not None for one in standing.values())
    return kept, {
        **notes,
        **({"resolved": resolved} if resolved else {}),
        **agreement(list(standing.values())),
    }


def by_policy(
    rows: list[dict[str, Any]], policy: str, tasks: dict[str, Task]
) -> tuple[list[dict], dict[str, Any]]:
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
    from ...text.reasoning_parser import split_thought

    origin = {**row["origin"], "editor": editor}
    if text.split() == row["completion"].split():
        return {**row, "origin": origin}
    thought = split_thought(text)
    kept = {k: v for k, v in row.items() if k != "tokens"}
    return {
        **kept,
        "completion": text,
        "reasoning_content": thought.thought,
        "content": thought.answer,
        "origin": origin,
    }


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
