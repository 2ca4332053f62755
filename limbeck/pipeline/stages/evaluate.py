"""`evaluate`: the accuracy of a model on test problems, with several ways of sampling (such as greedy, or
temperature 0.6)."""

from __future__ import annotations

import json
from typing import Any

from ...config.recipe import Evaluate
from ...engine.sampling import SamplingParams
from ...eval.evaluate import combine, evaluate
from ...run_log import read
from ...text.tokenizer import Tokenizer
from ..job import Job
from ..review import curate
from ..store import write
from .chunks import finished_chunks, remaining_chunks
from .cut_thought import CutThought
from .outcome import Outcome, outcome

PARTS = "ways.jsonl"  # results so far: one per source of problems and way of sampling
TEMPERATURE_AND_TOP_P = {
    "greedy": (0.0, 1.0),
    "t06": (0.6, 0.95),
}  # t06 is the paper's; others sample plainly


def run(job: Job) -> Outcome:
    """Evaluate each problem source with each way of sampling. A killed stage resumes after the last
    combination of source and way that it finished."""
    stage: Evaluate = job.stage
    model = next(iter(job.inputs))
    engine = job.sampler(model)
    decoder = engine.model
    tokenizer = engine.tokenizer
    sources = {name: job.mixture({name: 1.0}) for name in stage.problems}
    ways = {way: _sampling(way, stage, job.control, tokenizer) for way in stage.modes}
    parts = list(read(job.folder / PARTS))[: finished_chunks(job)]
    if job.control == "cut":
        styles = {name: getattr(job.problems[name], "answer", "tags") for name in stage.problems}
        engine = CutThought(engine, styles)
    results = evaluate(engine, sources, stage, ways, job.seed, len(parts))
    for number, log in remaining_chunks(job, len(ways) * len(sources)):
        part = next(results)
        parts.append(part)
        curate.write_rows(job.folder / PARTS, parts)
        accuracy = part["modes"][part["way"]]["accuracy"]["mean"]
        log.step(number, {"source": part["source"], "mode": part["way"], "accuracy": accuracy})
    (job.folder / PARTS).unlink()
    result = {"schema": 1, "model": model, "control": job.control, **combine(parts, job.seed)}
    curate.write_rows(job.folder / "samples.jsonl", [row for part in parts for row in part["samples"]])
    write(job.folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    tokens = sum(part["tokens"] for part in parts)
    context = _mean_length(result, stage) / 2
    return outcome(
        tokens, tokens * decoder.config.flops_per_token(context), parameters=decoder.config.parameters
    )


def _mean_length(result: dict[str, Any], stage: Evaluate) -> float:
    """Return the mean response length, in tokens, on the first problem source with the first way of sampling;
    100 if it was not measured."""
    source = next(iter(stage.problems))
    return result["sources"][source]["modes"][stage.modes[0]].get("length", 100)


def _sampling(way: str, stage: Evaluate, control: str | None, tokenizer: Tokenizer) -> SamplingParams:
    """Return the sampling parameters of the way of sampling `way`. With the control "forced", the first token
    of each phrase in the setting `retry` (by which the model gives up) is replaced by the first token of the
    phrase that goes on."""
    temperature, top_p = TEMPERATURE_AND_TOP_P.get(way, (1.0, 1.0))
    force = {}
    if control == "forced":
        for after, then in stage.retry.items():
            force[tokenizer.encode(after)[0]] = tokenizer.encode(then)[0]
    return SamplingParams(temperature, top_p, stage.max_new_tokens, force=force)
