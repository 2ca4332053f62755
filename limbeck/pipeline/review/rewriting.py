"""The policy `steps` of a curate stage: rows whose question asks for one sum get its worked steps as their
response, and each rewritten row is scored again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...tasks.answers import Verdict, judge
from ...types import Completion, Problem, Score, Task
from ..dataset_rows import problem_of, source_of
from .curate import edit_row
from .review_queue import VERDICTS

STEPS = "steps"  # the policy's name in a recipe
EDITS = "edits.jsonl"  # in an artifact: one `Rewriting` a line

Row = dict[str, Any]


@dataclass(frozen=True)
class Rewriting:
    """A row's response before and after a policy rewrote it: `Rewriting("sums/train-3#0", "steps",
    "2 + 3 is 5", "<think> First 2 + 3 = 5. </think> The answer is 5.", 1.0, "edit")`.

    `accuracy` is that of the text `after`. `verdict` is `accept` for a response that had this text already,
    `edit`, or `reject` with its `reason`.
    """

    id: str
    policy: str
    before: str
    after: str
    accuracy: float
    verdict: str
    reason: str = ""


def rewrite_rows(rows: list[Row], tasks: Mapping[str, Task]) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """Return (the rows that the policy keeps; its rewritings as JSON objects; notes for the manifest).

    A row whose task or question gives no steps is kept as it is. A rewritten row is rejected if its accuracy
    is below 1, or its answer another than that of its first text. `tasks` maps problem sources to tasks.
    """
    problems = {problem.id: problem for task in tasks.values() for problem in task.problems("train")}
    counts = dict.fromkeys(VERDICTS, 0)
    reasons: Counter[str] = Counter()
    kept: list[Row] = []
    rewritings: list[Row] = []
    for row in rows:
        problem = problems.get(problem_of(row["id"]))
        rewriting = problem and _rewrite(row, tasks[source_of(row["id"])], problem)
        if not rewriting:
            counts["accept"] += 1
            kept.append(row)
            continue
        counts[rewriting.verdict] += 1
        rewritings.append(asdict(rewriting))
        if rewriting.reason:
            reasons[rewriting.reason] += 1
        else:
            kept.append(edit_row(row, rewriting.after, f"policy: {STEPS}"))
    notes = {
        "policy": STEPS,
        "accepted": counts["accept"],
        "edited": counts["edit"],
        "rejected": counts["reject"],
    }
    return kept, rewritings, {**notes, "reasons": dict(reasons)} if reasons else notes


def _rewrite(row: Row, task: Task, problem: Problem) -> Rewriting | None:
    """Return what the policy makes of a row, or None if it cannot work its question out."""
    after = propose(task, problem)
    if after is None:
        return None
    before = row["completion"]
    score = score_text(task, problem, after)
    accuracy = score.parts["accuracy"]
    reason = ""
    if accuracy < 1:
        reason = "the steps end in a wrong answer"
    elif judge(score_text(task, problem, before).answer, score.answer) is not Verdict.CORRECT:
        reason = "the steps end in another answer than the response"
    verdict = "accept" if after.split() == before.split() else "edit"
    return Rewriting(row["id"], STEPS, before, after, accuracy, "reject" if reason else verdict, reason)


def propose(task: Task, problem: Problem) -> str | None:
    """Return a response to a problem with the worked steps of its sum. Return None if the task's questions
    cannot be worked out, or this one asks for no sum."""
    return task.work_out(problem) if hasattr(task, "work_out") else None


def score_text(task: Task, problem: Problem, text: str) -> Score:
    """Return the score of a text that was not sampled, taken as a response that ended by itself."""
    empty = np.zeros(0)
    return task.score(problem, Completion(empty.astype(int), empty, text, stopped=True, sample=0))
