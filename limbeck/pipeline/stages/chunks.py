"""Chunks of the stages that sample, label or evaluate: a chunk is a step of the run log, and a killed stage
resumes after its last whole chunk.

Stages that train resume from a checkpoint (train/checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ...run_log import RunLog, read_metrics
from ...types import Resumable
from ..job import Job


def finished_chunks(job: Job) -> int:
    """Return the number of chunks that are finished already."""
    return len(read_metrics(job.folder))


def remaining_chunks(job: Job, total: int) -> Iterator[tuple[int, RunLog]]:
    """Yield (number of the chunk, run log) for each chunk that is not finished. The caller must log exactly
    one step per chunk, after its other output.

    Raises Resumable between two chunks if the run should stop.
    """
    first = finished_chunks(job)
    log = job.record(first, total)
    for chunk in range(first, total):
        yield chunk, log
        if chunk < total - 1 and job.stopping():
            log.sync()
            raise Resumable(f"{job.name} stopped; the same command goes on from here")


def cut_back(job: Job, file: BinaryIO) -> None:
    """Truncate a file of rows to its length after the last finished chunk, which was logged as that step's
    metric `bytes`."""
    steps = read_metrics(job.folder)
    file.truncate(steps[-1]["bytes"] if steps else 0)
