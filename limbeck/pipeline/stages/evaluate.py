"""`evaluate`: the accuracy of a model on test problems, with several ways of sampling (such as greedy, or
temperature 0.6), and on named benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from ...config.recipe import Evaluate
from ...engine.rollout import Engine
from ...engine.sampling import SamplingParams
from ...eval.evaluate import combine, evaluate
from ...eval.suites import measure as suite
from ...report.loaded_run import SAMPLES, VERDICTS
from ...run_log import read
from ...text.tokenizer import Tokenizer
from ...types import Sampler
from ..job import Job
from ..review import curate
from ..store import write
from .chunks import finished_chunks, remaining_chunks
from .cut_thought import CutThought
from .outcome import Outcome, outcome

PARTS = "ways.jsonl"  # results so far: one per source of problems and way of sampling
SUITE_ROWS = "suite_items.jsonl"  # the verdicts on each item of the named benchmarks
TEMPERATURE_AND_TOP_P = {
    "greedy": (0.0, 1.0),
    "t06": (0.6, 0.95),
}  # t06 is the paper's; others sample plainly


def run(job: Job) -> Outcome:
    """Evaluate each problem source with each way of sampling, then each named benchmark. A killed stage
    resumes after the last combination of source and way, or the last part of a benchmark, that it finished.
    """
    stage: Evaluate = job.stage
    named = {} if job.control == "cut" else stage.suites or {}  # benchmarks have prompts of their own
    suites = [suite.open_suite(name, options) for name, options in named.items()]
    model = next(iter(job.inputs))
    engine = job.sampler(model)
    decoder = engine.model
    tokenizer = engine.tokenizer
    sources = {name: job.mixture({name: 1.0}) for name in stage.problems}
    ways = {way: _sampling(way, stage, job.control, tokenizer) for way in stage.modes}
    parts = list(read(job.folder / PARTS))[: finished_chunks(job)]
    measured: Sampler = engine
    if job.control == "cut":
        styles = {name: getattr(job.problems[name], "answer", "tags") for name in stage.problems}
        measured = CutThought(engine, styles)
    pairs = len(ways) * len(sources)
    results = chain(
        evaluate(measured, tokenizer, sources, stage, ways, job.seed, min(len(parts), pairs)),
        _measure_suites(job, suites, engine, parts[pairs:]),
    )
    _collect(job, pairs + len(list(suite.all_chunks(suites))), results, parts)
    result = _write(job, model, suites, parts)
    tokens = sum(part["tokens"] for part in parts)
    context = _mean_length(result, stage) / 2
    return outcome(
        tokens, tokens * decoder.config.flops_per_token(context), parameters=decoder.config.parameters
    )


def _collect(job: Job, total: int, results: Iterator[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    """Append the remaining ones of `total` results to `parts`, and save them after each."""
    for number, log in remaining_chunks(job, total):
        part = next(results)
        parts.append(part)
        curate.write_rows(job.folder / PARTS, parts)
        log.step(number, {"source": part["source"], "mode": part["way"], "accuracy": _accuracy(part)})
    (job.folder / PARTS).unlink()


def _write(
    job: Job, model: str, suites: Sequence[suite.SuiteTask], parts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write the evaluation, its samples and the verdicts on single problems, and return the evaluation."""
    asked = [part for part in parts if "modes" in part]
    result = {"schema": 1, "model": model, "control": job.control, **combine(asked, job.seed)}
    curate.write_rows(job.folder / SAMPLES, [row for part in asked for row in part["samples"]])
    curate.write_rows(job.folder / VERDICTS, [row for part in asked for row in part["verdicts"]])
    if suites:
        result["suites"] = _combine_suites(job, suites, parts[len(asked) :])
    write(job.folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result


def _measure_suites(
    job: Job, tasks: Sequence[suite.SuiteTask], engine: Engine, done: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the verdicts on each part of each benchmark that is not among the parts `done`."""
    engines = suite.engines_for(tasks, engine)
    for task, part in list(suite.all_chunks(tasks))[len(done) :]:
        rows = suite.measure(task, part, engines[task.suite.name], job.seed)
        tokens = sum(sum(row.get("tokens", [])) for row in rows)
        yield {"source": task.suite.name, "way": task.protocol.name, "rows": rows, "tokens": tokens}


def _combine_suites(
    job: Job, tasks: Sequence[suite.SuiteTask], parts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the result of each benchmark by its name, and write the verdicts on its items to a file."""
    rows = [{"suite": part["source"], **row} for part in parts for row in part["rows"]]
    curate.write_rows(job.folder / SUITE_ROWS, rows)
    results = {}
    for task in tasks:
        results[task.suite.name] = suite.combine(
            task, [row for row in rows if row["suite"] == task.suite.name]
        )
    return results


def _accuracy(part: dict[str, Any]) -> float:
    """Return the headline of a part: the accuracy, or the share of right verdicts of the first metric."""
    if "modes" in part:
        return part["modes"][part["way"]]["accuracy"]["mean"]
    verdicts = [next(iter(row["verdicts"].values())) for row in part["rows"]]
    values = [value for samples in verdicts for sample in samples for value in sample]
    return sum(values) / len(values)


def _mean_length(result: dict[str, Any], stage: Evaluate) -> float:
    """Return the mean response length, in tokens, on the first problem source with the first way of sampling;
    100 if it was not measured."""
    source = next(iter(stage.problems), None)
    if source is None:
        return 100
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
