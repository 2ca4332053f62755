"""The desks of all runs: which curate stages there are, where their queues lie, and what is known of each row's problem.

Read from what runs left on disk (`recipe.yaml`, `stages.json`, manifests), so that a list of desks hashes no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...config.load import load
from ...config.recipe import Curate, Recipe
from ...tasks.registry import open_task
from ...text.reasoning_parser import split_thought
from ...types import Completion, LimbeckError, Problem, Score, Task
from ..store import MANIFEST
from . import reviews

RECIPE, STAGES = "recipe.yaml", "stages.json"


@dataclass(frozen=True)
class Desk:
    """A curate stage that people decide at: `Desk(Path("runs/quickstart"), "coldstart", Path("runs/store/.queues/8c41…"), None, stage)`.

    `queue` is None until the rows are there, `taken` the digest of the reviews that the stage went on with, if it has.
    """

    run: Path
    stage: str
    queue: Path | None
    taken: str | None
    settings: Curate

    @property
    def state(self) -> str:
        """`early` (no rows yet), `asks`, `ready` (reviewed, the run may go on), `done`, or `changed` (reviewed anew since)."""
        if self.queue is None:
            return "early"
        if not reviews.complete(self.queue):
            return "asks"
        if self.taken is None:
            return "ready"
        return "done" if self.taken == reviews.digest(self.queue, reviews.extent(self.queue)) else "changed"


def desks(home: Path) -> list[Desk]:
    """All desks of the runs in a folder; those that ask first."""
    found = []
    for path in sorted(home.glob(f"*/{RECIPE}")):
        try:
            stages = recipe_of(path.parent).stages
        except LimbeckError:  # a run of an older version: its recipe says what no longer exists
            continue
        found += [
            _desk(path.parent, name, stage)
            for name, stage in stages.items()
            if isinstance(stage, Curate) and not stage.auto
        ]
    order = ("asks", "ready", "changed", "early", "done")
    return sorted(found, key=lambda desk: order.index(desk.state))


def desk(home: Path, run: str, stage: str) -> Desk:
    """One desk by the names of its run and its stage; LimbeckError where there is none."""
    folder = next((path.parent for path in home.glob(f"*/{RECIPE}") if path.parent.name == run), None)
    settings = recipe_of(folder).stages.get(stage) if folder else None
    if not isinstance(settings, Curate) or settings.auto:
        raise LimbeckError(
            f"{run}, {stage}: there is no such desk in {home}; `limbeck status` says who waits for people"
        )
    return _desk(folder, stage, settings)


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run, read once."""
    return _recipe(run, (run / RECIPE).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _recipe(run: Path, stamp: int) -> Recipe:
    return load(run / RECIPE)


def _desk(run: Path, name: str, settings: Curate) -> Desk:
    artifacts = json.loads((run / STAGES).read_text(encoding="utf-8")) if (run / STAGES).exists() else {}
    given = _manifest(run, artifacts.get(settings.rows))
    queue = run.parent / "store" / ".queues" / given["digest"][:16] if given else None
    if queue is None or not (queue / reviews.QUEUE).exists():
        return Desk(run, name, None, None, settings)
    mine = _manifest(run, artifacts.get(name)) or {"identity": {}}
    fresh = mine["identity"].get("inputs", {}).get(settings.rows) == given["digest"]
    return Desk(run, name, queue, mine["identity"].get("reviews") if fresh else None, settings)


def _manifest(run: Path, artifact: str | None) -> dict[str, Any] | None:
    path = run.parent / "store" / (artifact or "") / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if artifact and path.exists() else None


# ---------------------------------------------------------------- what is known of a row


@dataclass(frozen=True)
class Finding:
    """What the recipe's verifier says of a text: `Finding("6 *5 +1", None, Score(...))`.

    `answer` is what the text answers, `gold` the answer given with the problem, where one is. `score` is None where nobody
    can judge here, and `why` says why.
    """

    answer: str
    gold: str | None = None
    score: Score | None = None
    why: str = ""


def verify(desk: Desk, row: Mapping[str, Any], text: str) -> Finding:
    """Judge a row's text, edited or not, as the recipe judges completions."""
    try:
        task, problem = _problem(desk, row["id"])
    except (LimbeckError, OSError) as error:  # a file that has gone, or an extra that is not installed here
        return Finding(split_thought(text).answer, why=str(error))
    nothing = np.zeros(0)
    score = task.score(problem, Completion(nothing.astype(int), nothing, text, stopped=True, sample=0))
    return Finding(score.answer or split_thought(text).answer, problem.answer, score)


def rewritten(desk: Desk, row: Mapping[str, Any], text: str) -> str | None:
    """The text with its thought in its question's language, where the row's task knows how to put it; else None."""
    try:
        task, _ = _problem(desk, row["id"])
    except (LimbeckError, OSError):
        return None
    return (
        with_thought(text, task.rewrite(split_thought(text).thought, row["language"]))
        if hasattr(task, "rewrite")
        else None
    )


def with_thought(text: str, thought: str) -> str:
    """The text with another thought and the same answer."""
    return f"<think> {thought.strip()} </think> {split_thought(text).answer}"


def _problem(desk: Desk, id: str) -> tuple[Task, Problem]:
    name, _, _ = id.partition("/")
    task, problems = _problems(desk.run, (desk.run / RECIPE).stat().st_mtime_ns, name)
    found = problems.get(id.rpartition("#")[0])
    if found is None:
        raise LimbeckError(f"the recipe's problems have no {id.rpartition('#')[0]}")
    return task, found


@lru_cache(maxsize=8)
def _problems(run: Path, stamp: int, name: str) -> tuple[Task, dict[str, Problem]]:
    sources = recipe_of(run).problems
    if name not in sources:
        raise LimbeckError(f"the recipe has no problems of the name {name}")
    task = open_task(name, sources[name], run)
    return task, {problem.id: problem for problem in task.problems("train")}
