"""`screen`: keep the problems that a model solves sometimes, neither always nor never."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from ...config.recipe import Screen
from ...text.prompt_format import PromptFormat
from ...types import Group, LimbeckError, Problem
from ..dataset_rows import PROBLEMS
from ..job import Job
from .outcome import Outcome
from .sweep import sweep


def run(job: Job) -> Outcome:
    """Sample completions of each problem, and keep the problems with a pass rate strictly between `low` and
    `high`.

    Raises LimbeckError if no problem is kept.
    """
    stage: Screen = job.stage

    def judge(group: Group) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Return (the group's problem as a list of one row, no reasons) if it is solved sometimes, else ([],
        the reason for dropping it)."""
        rate = sum(score.parts["accuracy"] for score in group.scores) / len(group.scores)
        if stage.low < rate < stage.high:
            return [{**_to_row(group.problem), "pass_rate": rate}], Counter()
        return [], Counter(["never solved" if rate <= stage.low else "always solved"])

    result = sweep(job, PROBLEMS, stage.limit, judge)
    if not result["notes"]["kept"]:
        dropped = result["notes"]["dropped"]
        raise LimbeckError(
            f"of {stage.limit} problems {dropped.get('never solved', 0)} are never and "
            f"{dropped.get('always solved', 0)} always solved, none sometimes; "
            f"take other ones than {', '.join(stage.problems)}"
        )
    return result


def _to_row(problem: Problem) -> dict[str, Any]:
    """Return a problem as a row, without the parts of its prompt's format that are the plain ones."""
    row = asdict(problem)
    for name, value in asdict(PromptFormat()).items():
        if row[name] == value:
            del row[name]
    return row
