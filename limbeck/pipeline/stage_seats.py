"""The seats of a stage: what samples and grades in place of the stage's own process, told in its manifest."""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from .store import write

if TYPE_CHECKING:
    from ..cluster.fleet import Fleet
    from ..cluster.pool import SeatPool
    from ..config.hosts import Hosts
    from ..model.decoder import Decoder
    from ..text.tokenizer import Tokenizer
    from .job import Job

SEATS = "seats.json"  # in a partial folder: what the stage has sampled on, in order; null is its own process
SAMPLING = ("rl", "sample", "screen", "pairs", "distill", "calibrate", "evaluate")  # kinds that sample


@cache
def pool_of(hosts: Hosts) -> SeatPool:
    """Return this process's seats for these settings. They serve one stage after another."""
    from ..cluster.hosts import Local
    from ..cluster.pool import SeatPool

    pool = SeatPool(Local(hosts.seats.threads), hosts.seats.count, hosts.patience, hosts.restarts)
    atexit.register(pool.close)
    return pool


def fleet(job: Job, decoder: Decoder, tokenizer: Tokenizer, speculate: bool) -> Fleet:
    """Return the engine of a stage that samples on seats, with the weights of `decoder`. Its seats grade the
    completions of the stage's problems."""
    from ..cluster.fleet import Fleet

    sources = {name: source.model_dump(mode="json") for name, source in job.problems.items()}
    return Fleet(pool_of(job.hosts), decoder, tokenizer, job.hosts.shard, speculate, sources)


def ready_seats(job: Job, tell: Callable[[str], None]) -> dict[str, Any]:
    """Make seats ready for a stage, note in its folder what it samples on, and return what its manifest says
    of that: nothing where it was its own process from beginning to end. Call it before the stage's kernels
    are chosen.

    Where a killed stage goes on with other seats, `tell` is called: they may round differently.
    """
    from .continuation import KERNELS

    if job.hosts:
        pool_of(job.hosts).begin(tell)
    if not _samples(job):
        return {}
    path = job.folder / SEATS
    earlier = [None] if (job.folder / KERNELS).exists() else []
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
    now = job.hosts.identity if job.hosts else None
    if earlier and earlier[-1] != now:
        tell(
            f"it began with {_in_words(earlier[-1])} and goes on with {_in_words(now)}, which may round "
            "differently: its files may not be those of a run with one of them"
        )
    history = earlier if earlier[-1:] == [now] else [*earlier, now]
    if history == [None]:
        return {}
    write(path, json.dumps(history))
    before = {"before": history[:-1]} if history[:-1] else {}
    return {"seats": {**(now or {"kind": "worker"}), **before}}


def _samples(job: Job) -> bool:
    """Return True if a stage samples with a model of its own; not with an endpoint or a vLLM server."""
    stage = job.stage
    if stage.kind not in SAMPLING or getattr(stage, "engine", None):
        return False
    if stage.kind == "distill":
        return bool(stage.on_policy)
    models = {getattr(stage, key, None) for key in ("model", "judge")} - {None}
    return stage.kind == "evaluate" or bool(models - set(job.endpoints))


def seats_of(manifest: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """Return what an artifact was sampled on, in order, from its manifest; None is the worker itself."""
    seats = dict(manifest.get("seats", {"kind": "worker"}))
    return [*seats.pop("before", []), None if seats["kind"] == "worker" else seats]


def _in_words(seats: dict[str, Any] | None) -> str:
    """Return what sampled in words: `seats of 1 thread, shards of 64`."""
    if seats is None:
        return "no seats"
    return f"seats of {seats['threads']} threads and shards of {seats['shard']}"
