"""The command `limbeck curate`, for people who review rows.

A curate stage stops the run until people have judged its rows (training examples).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .options import RunFolder, open_run, usage_error

app = typer.Typer()


@app.command()
def curate(
    run_folder: RunFolder,
    stage: Annotated[str, typer.Argument(help="the curate stage that waits")],
    reviewer: Annotated[str, typer.Option(help="who reviews")] = os.environ.get("USER", "somebody"),
    second: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="let two people review this share of the rows", show_default=False),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="write the open rows to this JSONL file, to be filled in")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="take verdicts over from a JSONL file")
    ] = None,
) -> None:
    """Review the rows of a waiting stage: here at the terminal, or in a JSONL file (fields: verdict,
    completion).
    """
    from ..pipeline.review import review_queue
    from ..pipeline.review.curate import write_rows
    from .review import review_at_terminal

    queue = _queue(run_folder, stage)
    if second is not None:
        review_queue.set_second_share(queue, second, reviewer)
        print(f"two people review {second:.0%} of the rows; {len(review_queue.pending(queue))} rows are open")
    elif export:
        rows = review_queue.export_rows(queue, reviewer)
        write_rows(export, rows)
        print(f"wrote {len(rows)} rows to {export}; set each verdict to accept, edit or reject")
    elif import_:
        imported = review_queue.import_reviews(queue, import_, reviewer)
        print(f"took {imported} verdicts over; {len(review_queue.pending(queue))} rows are still open")
    else:
        review_at_terminal(queue, reviewer)


def _queue(run_folder: Path, stage: str) -> Path:
    """Return the folder of a curate stage's review queue: the rows that people have to judge.

    Raises a usage error if the run has no stage `stage` or that stage has no queue.
    """
    node = open_run(run_folder).nodes.get(stage)
    if node is None or node.queue is None:
        raise usage_error(f"{stage} is not a stage of {run_folder} that waits for people")
    return node.queue
