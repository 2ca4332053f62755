"""`general`: rows of problems that come with their answer, without a thought."""

from __future__ import annotations

from typing import Any

from ...config.recipe import General
from ...types import Problem
from ..dataset_rows import ROWS
from ..job import Job
from ..review import curate
from .outcome import Outcome, outcome


def run(job: Job) -> Outcome:
    """Draw problems and write them with their answers as rows."""
    stage: General = job.stage
    tasks = job.mixture({stage.problems: 1.0})
    rows = [_row(problem) for problem in tasks.draw(stage.rows, (job.seed, "prompts"))]
    curate.write_rows(job.folder / ROWS, rows)
    return outcome(rows=len(rows))


def _row(problem: Problem) -> dict[str, Any]:
    """Return a problem and its answer as a row."""
    return {
        "id": problem.id,
        "prompt": problem.prompt,
        "language": problem.language,
        "completion": f"<answer> {problem.answer} </answer>",
        "origin": {"problem": problem.origin, "writer": "the world itself"},
    }
