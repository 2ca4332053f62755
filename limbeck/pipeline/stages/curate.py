"""`curate`: rows that people, or the stage's policy, accept, edit or reject."""

from __future__ import annotations

from ...config.recipe import Curate
from ..dataset_rows import ROWS
from ..job import Job
from ..review import curate
from .budget import data_flops
from .outcome import Outcome, outcome


def run(job: Job) -> Outcome:
    """Keep, edit and drop rows by the reviews in the stage's queue or, with the setting `auto`, by its
    policy."""
    stage: Curate = job.stage
    rows = job.rows(stage.rows)
    if stage.auto:
        names = {row["id"].partition("/")[0] for row in rows} & set(job.problems)
        kept, notes = curate.apply_policy(rows, stage.policy, {name: job.task(name) for name in names})
    else:
        kept, notes = curate.apply_reviews(rows, job.queue, job.review_bytes)
    curate.write_rows(job.folder / ROWS, kept)
    carried = job.manifest(stage.rows)["notes"]
    if "tokenizer" in carried:
        notes = {**notes, "tokenizer": carried["tokenizer"]}
    return outcome(**notes, data_flops=data_flops(job, [stage.rows]))
