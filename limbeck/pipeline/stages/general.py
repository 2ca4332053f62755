"""`general`: rows that need no thought: problems of a miniature with their answers, or instructions and
responses that a model writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...config.parts import Sampling
from ...config.recipe import General
from ...engine.sampling import to_sampling_params
from ...run_log import read_metrics
from ...tasks.files import language_of
from ...train.training_log import count_flops, sampled_tokens
from ...types import Group, LimbeckError, Message, Problem
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
    """Sample instructions from a model, and a response to each (Magpie, arXiv 2406.08464, section 2.1). A
    response that ran out of tokens is kept as it is, without an end-of-turn token."""
    stage: General = job.stage
    settings = stage.sampling or Sampling()
    writer = _Writer(job, settings)
    names = [f"{job.name}/{number}" for number in range(stage.rows)]
    chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
    origin = {"sampler": job.manifest(stage.model)["digest"]}
    with open(job.folder / ROWS, "ab") as file:
        cut_back(job, file)
        for number, log in remaining_chunks(job, len(chunks)):
            asked = writer.instructions(chunks[number])
            answered = writer.responses([problem for group in asked if (problem := _to_problem(group))])
            rows = [to_row(group, group.completions[0], origin) for group in answered]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            costs = writer.costs([*asked, *answered])
            log.step(number, {**costs, "kept": len(rows), "bytes": file.tell()})
    steps = read_metrics(job.folder)
    kept, tokens, flops = (sum(step[name] for step in steps) for name in ("kept", "sampled_tokens", "flops"))
    return outcome(tokens, flops, rows=kept, sampled=stage.rows, tokenizer=tokenizer_digest(writer.tokenizer))


class _Writer:
    """A model that writes instructions and responses. The engine's prompts are rendered already.

    Raises LimbeckError for a model without a chat template, or whose template writes nothing before a user's
    text: there is nothing to continue.
    """

    def __init__(self, job: Job, settings: Sampling):
        name = job.stage.model
        self.seed = job.seed
        self.sampling = to_sampling_params(settings)
        self.engine = job.sampler(name, settings.speculate)
        self.tokenizer = self.engine.tokenizer
        self.engine.tokenizer = self.tokenizer.plain()
        self.opening = self.tokenizer.user_opening()
        if not self.opening:
            raise LimbeckError(
                f"stages.{job.name}.model: {name} has no chat template that marks a user's turn, which the "
                "model is to write; name a model that was trained on chats"
            )

    def instructions(self, names: Sequence[str]) -> list[Group]:
        """Return a group of one instruction for each name: the model's continuation of what the chat template
        writes before a user's text."""
        problems = [Problem(name, self.opening) for name in names]
        return self.engine.rollout(problems, 1, self.sampling, (self.seed, "instructions"))

    def responses(self, problems: Sequence[Problem]) -> list[Group]:
        """Return a group of one response for each problem."""
        rendered = []
        for problem in problems:
            text = self.tokenizer.render([Message(role="user", content=problem.prompt)])
            rendered.append(replace(problem, prompt=text))
        groups = self.engine.rollout(rendered, 1, self.sampling, (self.seed, "responses"))
        return [replace(group, problem=problem) for group, problem in zip(groups, problems, strict=True)]

    def costs(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the tokens sampled for the groups and the FLOPs of sampling them. A token is taken to attend
        to its prompt and half of its completion."""
        tokens = sampled_tokens(groups)
        contexts = [len(group.prompt_tokens) + len(group.completions[0].tokens) / 2 for group in groups]
        flops = count_flops(self.engine.model.config, tokens, 0, float(np.mean(contexts)))
        return {"sampled_tokens": tokens, "flops": flops}


def _to_problem(group: Group) -> Problem | None:
    """Return the instruction of a group as a problem, None if it is empty or ran out of tokens."""
    instruction = group.completions[0]
    text = instruction.text.strip()
    if not text or not instruction.stopped:
        return None
    return Problem(group.problem.id, text, language=language_of(text), origin="the model's own instruction")
