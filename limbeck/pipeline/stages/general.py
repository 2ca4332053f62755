"""`general`: rows that need no thought: problems of a miniature with their answers, or instructions and
responses that a model writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...config.parts import Sampling
from ...config.recipe import General
from ...engine.rollout import Engine
from ...engine.sampling import SamplingParams, to_sampling_params
from ...run_log import read_metrics
from ...tasks.files import language_of
from ...train.training_log import count_flops, sampled_tokens
from ...types import Group, LimbeckError, Problem
from ..dataset_rows import ROWS
from ..job import Job
from ..review import curate
from .chunks import cut_back, remaining_chunks
from .outcome import Outcome, outcome
from .rows import to_row, tokenizer_digest

CHUNK = 64  # instructions between two saves


def run(job: Job) -> Outcome:
    """Write the rows of the model or of the problems that the stage names."""
    return _write_with_model(job) if job.stage.model else _draw(job)


# ---------------------------------------------------------------- of a miniature


def _draw(job: Job) -> Outcome:
    """Draw problems and write them with their answers as rows."""
    stage: General = job.stage
    tasks = job.mixture({stage.problems: 1.0})
    rows = [_row(problem) for problem in tasks.draw(stage.rows, (job.seed, "prompts"))]
    curate.write_rows(job.folder / ROWS, rows)
    return outcome(rows=len(rows))


def _row(problem: Problem) -> dict[str, Any]:
    """Return a problem and its answer as a row."""
    return {
        "id": problem.id,
        "prompt": problem.prompt,
        "language": problem.language,
        "completion": f"<answer> {problem.answer} </answer>",
        "origin": {"problem": problem.origin, "writer": "the world itself"},
    }


# ---------------------------------------------------------------- of a model


def _write_with_model(job: Job) -> Outcome:
    """Sample instructions from a model, and a response to each (Magpie, arXiv 2406.08464, section 2.1).

    A response that ran out of tokens is kept as it is, without an end-of-turn token. Raises LimbeckError for
    a model whose chat template writes nothing before a user's text, so that there is nothing to continue.
    """
    stage: General = job.stage
    engine = job.sampler(stage.model)
    opening = engine.tokenizer.user_opening()
    if not opening:
        raise LimbeckError(
            f"stages.{job.name}.model: {stage.model} has no chat template that marks a user's turn, which "
            "the model is to write; name a model that was trained on chats"
        )
    sampling = to_sampling_params(stage.sampling or Sampling())
    origin = {"sampler": job.manifest(stage.model)["digest"]}
    names = [f"{job.name}/{number}" for number in range(stage.rows)]
    chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
    with open(job.folder / ROWS, "ab") as file:
        cut_back(job, file)
        for number, log in remaining_chunks(job, len(chunks)):
            asked = _write_instructions(engine, opening, chunks[number], sampling, job.seed)
            problems = [problem for group in asked if (problem := _to_problem(group))]
            groups = engine.rollout(problems, 1, sampling, (job.seed, "responses"))
            rows = [to_row(group, group.completions[0], origin) for group in groups]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            log.step(number, {**_costs([*asked, *groups], engine), "kept": len(rows), "bytes": file.tell()})
    steps = read_metrics(job.folder)
    kept = sum(step["kept"] for step in steps)
    tokenizer = tokenizer_digest(engine.tokenizer)
    tokens, flops = (sum(step[name] for step in steps) for name in ("sampled_tokens", "flops"))
    return outcome(tokens, flops, rows=kept, sampled=stage.rows, tokenizer=tokenizer)


def _write_instructions(
    engine: Engine, opening: str, names: Sequence[str], sampling: SamplingParams, seed: object
) -> list[Group]:
    """Return a group of one instruction for each name. `opening` is what the chat template writes before it;
    the model ends it with its end-of-turn token."""
    writer = Engine(engine.model, engine.tokenizer.plain(), engine.rows)
    return writer.rollout([Problem(name, opening) for name in names], 1, sampling, (seed, "instructions"))


def _to_problem(group: Group) -> Problem | None:
    """Return the instruction of a group as a problem, None if it is empty or ran out of tokens."""
    instruction = group.completions[0]
    text = instruction.text.strip()
    if not text or not instruction.stopped:
        return None
    return Problem(group.problem.id, text, language=language_of(text), origin="the model's own instruction")


def _costs(groups: Sequence[Group], engine: Engine) -> dict[str, float]:
    """Return the tokens sampled for the groups and the FLOPs of sampling them. A token is taken to attend to
    its prompt and half of its completion."""
    tokens = sampled_tokens(groups)
    context = np.mean([len(group.prompt_tokens) + len(group.completions[0].tokens) / 2 for group in groups])
    return {"sampled_tokens": tokens, "flops": count_flops(engine.model.config, tokens, 0, float(context))}
