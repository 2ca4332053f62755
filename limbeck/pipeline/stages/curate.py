"""`curate`: rows that people, or the stage's policy, accept, edit or reject."""

from __future__ import annotations

from typing import Any

from ...config.recipe import Curate
from ..dataset_rows import ROWS, source_of
from ..job import Job
from ..review import curate, rewriting
from .budget import data_flops
from .outcome import Outcome, outcome


def run(job: Job) -> Outcome:
    """Keep, edit and drop rows by the reviews in the stage's queue or, with the setting `auto`, by its
    policy."""
    stage: Curate = job.stage
    rows = job.rows(stage.rows)
    if stage.auto:
        kept, notes = _apply_policy(job, rows)
    else:
        kept, notes = curate.apply_reviews(rows, job.queue, job.review_bytes)
    curate.write_rows(job.folder / ROWS, kept)
    carried = job.manifest(stage.rows)["notes"]
    if "tokenizer" in carried:
        notes = {**notes, "tokenizer": carried["tokenizer"]}
    return outcome(**notes, data_flops=data_flops(job, [stage.rows]))


def _apply_policy(job: Job, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return (the rows that the stage's policy keeps; notes for the manifest). The policy `steps` also writes
    what it rewrote to the file `edits.jsonl`."""
    names = {source_of(row["id"]) for row in rows} & set(job.problems)
    tasks = {name: job.task(name) for name in names}
    if job.stage.policy != rewriting.STEPS:
        return curate.apply_policy(rows, job.stage.policy, tasks)
    kept, rewritings, notes = rewriting.rewrite_rows(rows, tasks)
    curate.write_rows(job.folder / rewriting.EDITS, rewritings)
    return kept, notes
