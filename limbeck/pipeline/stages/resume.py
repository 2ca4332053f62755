"""Resume of stages that work in chunks: a chunk is a step of the run log, and only whole chunks are in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ...run_log import RunLog, read_metrics
from ...types import Resumable
from ..job import Job


def finished_chunks(job: Job) -> int:
    """The number of chunks that were finished before."""
    return len(read_metrics(job.folder))


def remaining_chunks(job: Job, total: int) -> Iterator[tuple[int, RunLog]]:
    """The numbers of the chunks that are left, each with the run log; the caller logs one step per chunk,
    last.

    Raises Resumable between two chunks if the run is to stop.
    """
    first = finished_chunks(job)
    log = job.record(first, total)
    for chunk in range(first, total):
        yield chunk, log
        if chunk < total - 1 and job.stopping():
            log.sync()
            raise Resumable(f"{job.name} stopped; the same command goes on from here")


def cut_back(job: Job, file: BinaryIO) -> None:
    """Cut a file of rows back to its length after the last finished chunk, which is that step's metric
    `bytes`."""
    steps = read_metrics(job.folder)
    file.truncate(steps[-1]["bytes"] if steps else 0)
