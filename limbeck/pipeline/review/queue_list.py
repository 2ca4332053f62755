"""The review queues of all runs, and the verification of a row's text by the checker of its recipe.

A queue is the folder of rows that people review for one curate stage. The queues are found from the files of
runs (`recipe.yaml`, `stages.json`, manifests), so that listing them does not hash models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...config.recipe import Curate
from ...tasks.registry import open_task
from ...text.reasoning_parser import split_thought
from ...types import LimbeckError, Problem, Score, Task
from ..dataset_rows import problem_of, source_of
from ..run_folder import INDEX, RECIPE, read_json, read_manifest, read_recipe, run_folders, store_of
from . import review_queue
from .rewriting import propose, score_text

ORDER = ("asks", "ready", "changed", "early", "done")  # of the states in a list of queues


@dataclass(frozen=True)
class ReviewQueue:
    """A curate stage whose rows people review:
    `ReviewQueue(Path("runs/quickstart"), "coldstart", Path(".../.queues/8c41…"), None, stage)`.

    `run` is the run's folder and `settings` the stage's settings. `queue` is None until the rows have been
    written. `taken` is the digest of the reviews that the stage has used, None if it has not run.
    """

    run: Path
    stage: str
    queue: Path | None
    taken: str | None
    settings: Curate

    @property
    def state(self) -> str:
        """`early` (no rows yet), `asks` (rows need reviews), `ready` (all reviewed, the run can go on),
        `done` (the stage has used the reviews) or `changed` (reviews were added after the stage used them).
        """
        if self.queue is None:
            return "early"
        if not review_queue.complete(self.queue):
            return "asks"
        if self.taken is None:
            return "ready"
        current = review_queue.digest(self.queue, review_queue.extent(self.queue))
        return "done" if self.taken == current else "changed"


def list_queues(home: Path) -> list[ReviewQueue]:
    """Return the review queues of all runs in `home`, first those whose rows need reviews."""
    queues = []
    for run in run_folders(home):
        try:
            stages = read_recipe(run).stages
        except LimbeckError:  # a run of an older version, whose recipe has keys that no longer exist
            continue
        for name, stage in stages.items():
            if isinstance(stage, Curate) and not stage.auto:
                queues.append(_open(run, name, stage))
    return sorted(queues, key=lambda queue: ORDER.index(queue.state))


def find_queue(home: Path, run: str, stage: str) -> ReviewQueue:
    """Return the review queue of a stage, by the names of its run and its stage. Raises LimbeckError if there
    is none."""
    for folder in run_folders(home):
        if folder.name == run:
            settings = read_recipe(folder).stages.get(stage)
            if isinstance(settings, Curate) and not settings.auto:
                return _open(folder, stage, settings)
    raise LimbeckError(
        f"{run}, {stage}: there is no such review queue in {home}; `limbeck status` says who waits for people"
    )


def _open(run: Path, name: str, settings: Curate) -> ReviewQueue:
    """Return the review queue of the curate stage `name` in the folder `run`."""
    artifacts = read_json(run / INDEX)
    rows = _manifest(run, artifacts.get(settings.rows))
    if not rows:
        return ReviewQueue(run, name, None, None, settings)
    queue = review_queue.queue_folder(store_of(run), rows["digest"])
    if not (queue / review_queue.QUEUE).exists():
        return ReviewQueue(run, name, None, None, settings)
    identity = _manifest(run, artifacts.get(name)).get("identity", {})
    fresh = identity.get("inputs", {}).get(settings.rows) == rows["digest"]
    return ReviewQueue(run, name, queue, identity.get("reviews") if fresh else None, settings)


def _manifest(run: Path, artifact: str | None) -> dict[str, Any]:
    """Return the manifest of the artifact folder of that name; {} if the name is None."""
    return read_manifest(store_of(run) / artifact) if artifact else {}


# ---------------------------------------------------------------- verification of a row


@dataclass(frozen=True)
class Verification:
    """The result of checking a text with the recipe's checker: `Verification("6 *5 +1", None, Score(...))`.

    `answer` is the answer found in the text, `gold` the correct answer of the problem, if it has one. If the
    text cannot be checked here, `score` is None and `why` is the reason.
    """

    answer: str
    gold: str | None = None
    score: Score | None = None
    why: str = ""


def verify(queue: ReviewQueue, row: Mapping[str, Any], text: str) -> Verification:
    """Check `text`, the original or edited response of `row`, with the checker that the recipe uses for
    completions."""
    try:
        task, problem = _problem(queue, row["id"])
    except (
        LimbeckError,
        OSError,
    ) as error:  # a file that was deleted, or an extra that is not installed here
        return Verification(split_thought(text).answer, why=str(error))
    score = score_text(task, problem, text)
    return Verification(score.answer or split_thought(text).answer, problem.answer, score)


def rewrite_thought(queue: ReviewQueue, row: Mapping[str, Any], text: str) -> str | None:
    """Return `text` with its thought rewritten in the language of the row's question. Return None if the
    row's task cannot rewrite."""
    try:
        task, _ = _problem(queue, row["id"])
    except (LimbeckError, OSError):
        return None
    if not hasattr(task, "rewrite"):
        return None
    return replace_thought(text, task.rewrite(split_thought(text).thought, row["language"]))


def propose_steps(queue: ReviewQueue, row: Mapping[str, Any]) -> str | None:
    """Return the response with worked steps that the policy `steps` would give the row. Return None if the
    row's question asks for no sum."""
    try:
        return propose(*_problem(queue, row["id"]))
    except (LimbeckError, OSError):
        return None


def replace_thought(text: str, thought: str) -> str:
    """Return the text with its thought replaced by `thought` and the same answer."""
    return f"<think> {thought.strip()} </think> {split_thought(text).answer}"


def _problem(queue: ReviewQueue, row_id: str) -> tuple[Task, Problem]:
    """Return the task and the problem that a row answers. Raises LimbeckError if the recipe has no such
    problem."""
    recipe = queue.run / RECIPE
    task, problems = _problems(queue.run, recipe.stat().st_mtime_ns, source_of(row_id))
    problem = problems.get(problem_of(row_id))
    if problem is None:
        raise LimbeckError(f"the recipe's problems have no {problem_of(row_id)}")
    return task, problem


@lru_cache(maxsize=8)
def _problems(run: Path, modified: int, name: str) -> tuple[Task, dict[str, Problem]]:
    """Open the problem source `name` of a run. Return its task, and its training problems by id. `modified`
    is the modification time of the recipe in ns, so that a changed recipe is not read from the cache."""
    sources = read_recipe(run).problems
    if name not in sources:
        raise LimbeckError(f"the recipe has no problems of the name {name}")
    task = open_task(name, sources[name], run)
    return task, {problem.id: problem for problem in task.problems("train")}
