"""Review of the rows of a queue at the terminal.

A row is one training example; a queue holds the rows that a curate stage waits for people to judge.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..pipeline.review import review_queue
from ..types import LimbeckError
from .display import printable

KEYS = {"a": "accept", "e": "edit", "r": "reject", "q": "quit"}


def review_at_terminal(queue: Path, reviewer: str) -> None:
    """Show the reviewer each row that is due: accept it, edit it (in $EDITOR) or reject it with a reason.
    Each verdict is saved at once.

    The rows on which two reviewers disagree come last, for a final verdict. Raises LimbeckError if standard
    input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise LimbeckError("curate needs a terminal; use --export FILE and --import FILE to review elsewhere")
    due = [row for row in review_queue.review_states(queue) if row.due(reviewer)]
    disputed = [row for row in review_queue.review_states(queue) if row.state == "disputed"]
    total = len(due) + len(disputed)
    for number, row in enumerate([*due, *disputed], 1):
        question = printable(row.row["question"])
        prompt = printable(row.row["prompt"])
        print(f"\n[{number}/{total}] {question}\n\n{prompt}\n")
        if not _review(queue, row, reviewer, settle=number > len(due)):
            break
    print(_rows_left(queue, reviewer))


def _rows_left(queue: Path, reviewer: str) -> str:
    """Return a sentence on how many rows are still to be reviewed, by this reviewer or by other people."""
    left = len(review_queue.pending(queue))
    if not left:
        return "all rows are reviewed: run the recipe again and it goes on"
    if any(row.due(reviewer) for row in review_queue.review_states(queue)):
        return f"{left} rows are left"
    return f"{left} rows are left, for other people"


def _review(queue: Path, row: review_queue.ReviewState, reviewer: str, settle: bool) -> bool:
    """Show one row and save the reviewer's verdict; return False if the reviewer quits instead.

    With `settle` the verdict is final: it replaces those of reviewers who disagreed.
    """
    print(printable(row.row["completion"]) + "\n")
    if settle:
        _show_verdicts(row)
    start = time.monotonic()
    key = _choose()
    if key == "q":
        return False
    entry = {"id": row.id, "verdict": KEYS[key], "reviewer": reviewer}
    if settle:
        entry["resolves"] = True
    if key == "e":
        entry["completion"] = _edit(row.row["completion"])
    if key == "r":
        entry["reason"] = input("why? ")
    entry["seconds"] = round(time.monotonic() - start, 1)
    review_queue.review(queue, entry)
    return True


def _show_verdicts(row: review_queue.ReviewState) -> None:
    """Print the verdicts on a row whose reviewers disagree."""
    for name, verdict in row.verdicts.items():
        detail = verdict.get("completion") or verdict.get("reason") or "as it is"
        print(printable(f"{name} says {verdict['verdict']}: {detail}\n"))


def _choose() -> str:
    """Ask until one of the keys of `KEYS` is typed, and return it: `a`, `e`, `r` or `q`."""
    while True:
        key = input("(a)ccept (e)dit (r)eject (q)uit: ").strip().lower()[:1]
        if key in KEYS:
            return key


def _edit(text: str) -> str:
    """Open `text` in $EDITOR and return the saved text, without newlines at its end."""
    editor = os.environ.get("EDITOR", "vi").split()
    with tempfile.NamedTemporaryFile("w+", suffix=".txt", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        subprocess.run([*editor, file.name], check=True)
        return Path(file.name).read_text(encoding="utf-8").rstrip("\n")
