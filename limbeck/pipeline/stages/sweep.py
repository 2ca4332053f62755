"""Sampling in chunks of `CHUNK` problems: each chunk's problems are answered and judged, and the resulting
rows appended to a file.

The stages `sample`, `screen` and `pairs` use it; they differ in how they judge a group (all completions of
one problem).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from ...activity import phase, track
from ...engine.openai_client import Endpoint
from ...engine.rollout import Engine
from ...engine.sampling import to_sampling_params
from ...run_log import read_metrics
from ...train.training_log import summarize
from ...types import Group
from ..job import Job
from .chunks import cut_back, remaining_chunks
from .outcome import Outcome, outcome
from .rewards import tasks_of

CHUNK = 64  # problems between two saves
BILLED = ("prompt_tokens", "response_tokens", "money", "judge_tokens", "judge_flops", "judge_money")

Judge = Callable[[Group], tuple[list[dict[str, Any]], Counter[str]]]  # rows kept, and why others were dropped
Usage = Callable[[], dict[str, float]]  # tokens, FLOPs and money since the last call


def sweep(job: Job, name: str, count: int, judge: Judge, take_usage: Usage = dict) -> Outcome:
    """Answer and judge `count` problems, and append the kept rows to the file `name`. A killed stage resumes
    after its last complete chunk.

    `judge` maps a group to the rows kept and the reasons for dropping the others. `take_usage` returns the
    cost of judging since its last call.
    """
    stage = job.stage
    engine = job.sampler(stage.model, stage.sampling.speculate)
    tasks = tasks_of(job)
    with phase("drawing problems"):
        problems = tasks.draw(count, (job.seed, "prompts"))
    chunks = [problems[i : i + CHUNK] for i in range(0, count, CHUNK)]
    sampling = to_sampling_params(stage.sampling)
    with open(job.folder / name, "ab") as file:
        cut_back(job, file)
        for number, log in remaining_chunks(job, len(chunks)):
            rollout = engine.rollout(chunks[number], stage.samples, sampling, job.seed)
            groups = [tasks.score(group) for group in track(rollout, "scoring", "problems")]
            counts = _write(file, groups, judge)
            usage = Counter(getattr(tasks, "take_usage", dict)())
            usage.update(take_usage())  # two judges may have been asked
            log.step(number, {**summarize(groups), **counts, **engine.take_usage(), **usage}, groups[:1])
    return _sum_up(job, engine, count * stage.samples)


def _write(file: Any, groups: list[Group], judge: Judge) -> dict[str, Any]:
    """Judge the groups and write the rows that are kept. Return the metrics of the chunk."""
    lines: list[str] = []
    dropped: Counter[str] = Counter()
    for group in track(groups, "filtering", "problems"):
        rows, reasons = judge(group)
        lines += [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        dropped += reasons
    file.write("".join(lines).encode())
    file.flush()
    return {
        "sampled_tokens": sum(len(c.tokens) for group in groups for c in group.completions),
        "kept": len(lines),
        "dropped": dict(sorted(dropped.items())),
        "bytes": file.tell(),
    }


def _sum_up(job: Job, engine: Engine | Endpoint, sampled: int) -> Outcome:
    """Return the outcome of all chunks. `sampled` is the number of completions. The FLOPs of an endpoint are
    unknown; its tokens and its price are noted instead."""
    steps = read_metrics(job.folder)
    tokens = sum(step["sampled_tokens"] for step in steps)
    dropped = sum((Counter(step["dropped"]) for step in steps), Counter())
    notes = {"sampled": sampled, "kept": sum(step["kept"] for step in steps), "dropped": dict(dropped)}
    billed = [name for name in (*BILLED, "teacher_flops") if name in steps[0]]
    usage: dict[str, Any] = {name: sum(step[name] for step in steps) for name in billed}
    judging_flops = usage.get("judge_flops", 0) + usage.get("teacher_flops", 0)
    if isinstance(engine, Engine):
        length = sum(step["length"] for step in steps) / len(steps)
        flops = tokens * engine.model.config.flops_per_token(length / 2) + judging_flops
        return outcome(tokens, flops, **notes, **usage)
    if engine.settings.prices:
        usage["currency"] = engine.settings.prices.currency
    endpoint = {"endpoint": engine.settings.url, "model": engine.settings.model}
    return outcome(tokens, judging_flops, **notes, **endpoint, **usage)
