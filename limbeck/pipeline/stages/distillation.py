"""The stages of distillation, one short function a kind: labels, pairs, preferences, divergences.

What they have in common with other stages is in basic.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ...config.learned_rewards import TABLES
from ...config.methods import DPO, Distill, Label, Pairs
from ...config.parts import Optimizer
from ...config.recipe import cited_rows
from ...engine.rollout import Engine
from ...engine.sampling import params_of
from ...run_log import read, read_metrics
from ...text.tokenizer import Tokenizer, join_thought
from ...train.batch import MICRO_TOKENS
from ...train.distill import LABELLED, Asked, DistillSampler, Teacher, domain, labelled, train_distill
from ...train.dpo import best_and_worst, plan_pairs, referenced, to_pair
from ...train.learner import Learner
from ...train.losses import preference
from ...types import Group, Labels, LimbeckError
from ...types import Sample as Learned
from ..dataset_rows import ROWS, share_of
from ..job import Job
from ..review import curate as desk
from ..store import digest_of
from .basic import Outcome, given_rows, pause, sweep, to_row, to_sample
from .judging import preferences
from .ranking import require_same_vocabulary, scorer_of
from .training import affordable, budget_of, data_flops, fit_samples, save_model

SHARD = 256  # rows whose labels stand in one file: what a kill may cost


def run_label(job: Job) -> Outcome:
    """A teacher's labels of rows, shard by shard; the rows and the tokenizer travel along."""
    stage: Label = job.stage
    decoder, tokenizer = job.model(stage.model)
    teacher = Learner(decoder, Optimizer(), 1)
    rows = [row for name, share in stage.rows.items() for row in given_rows(job, name, share, tokenizer)]
    samples = [to_sample(row, tokenizer, "keep") for row in rows]
    shards = [samples[i : i + SHARD] for i in range(0, len(samples), SHARD)]
    done = len(read_metrics(job.folder))
    record = job.record(done, len(shards))
    for step in range(done, len(shards)):
        labels = labelled(teacher, shards[step], stage.top_k, stage.temperature, stage.batch_tokens)
        _save_labels(job.folder, step, labels)
        known = float(np.mean(1 - np.exp(np.concatenate([one.tail for one in labels]))))
        record.step(step, {"labelled_tokens": sum(len(one.tail) for one in labels), "known_mass": known})
        pause(job, record, step < len(shards) - 1)
    desk.write_rows(
        job.folder / ROWS,
        [{**row, "tokens": s.tokens[s.start :].tolist()} for row, s in zip(rows, samples, strict=True)],
    )
    (job.folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(job.folder / "tokenizer")
    tokens = sum(len(s.tokens) for s in samples)
    flops = sum(len(s.tokens) * decoder.config.flops_per_token(len(s.tokens) / 2) for s in samples)
    notes = {
        "rows": len(rows),
        "tokenizer": digest_of(tokenizer.backend.to_str()),
        "data_flops": data_flops(job, stage.rows),
    }
    return {"tokens": tokens, "flops": flops, "notes": {**notes, "teacher_flops": flops}}


def run_pairs(job: Job) -> Outcome:
    """Best against worst of each problem's completions, with TRL's columns."""
    stage: Pairs = job.stage
    tokenizer, written = job.model(stage.model)[1], {"sampler": job.manifest(stage.model)["digest"]}
    scorer, bill = scorer_of(job)

    def judge(group: Group) -> tuple[list[dict], Counter[str]]:
        scores = scorer(group)
        places = best_and_worst(scores, stage.margin)
        if places is None:
            return [], Counter(["none is better"])
        best, worst = (to_row(group, group.completions[place], written) for place in places)
        told = {
            "chosen": best["completion"],
            "rejected": worst["completion"],
            "chosen_score": scores[places[0]],
            "rejected_score": scores[places[1]],
        }
        kept = {key: best[key] for key in ("id", "prompt", "language", "origin")}
        return [
            {**kept, **told, "chosen_tokens": best["tokens"], "rejected_tokens": worst["tokens"]}
        ], Counter()

    outcome = sweep(job, ROWS, stage.prompts, judge, bill)
    return {**outcome, "notes": {**outcome["notes"], "tokenizer": digest_of(tokenizer.backend.to_str())}}


def run_preference(job: Job) -> Outcome:
    stage: DPO = job.stage
    decoder, tokenizer = job.model(stage.model)
    samples = _pairs_of(job, tokenizer)
    if not samples:
        raise LimbeckError(f"there are no pairs to learn from; {', '.join(stage.pairs)} kept none")
    reading = sum(len(s.tokens) * decoder.config.flops_per_token(len(s.tokens) / 2) for s in samples)
    samples = referenced(Learner(decoder, stage.optimizer, 1), samples, MICRO_TOKENS)
    plan = plan_pairs(samples, stage.epochs, stage.batch_tokens, job.seed)
    sampled = cited_rows(*stage.pairs)
    plan = affordable(plan, samples, decoder.config, budget_of(job, sampled) - reading)
    outcome = fit_samples(
        job, decoder, tokenizer, samples, plan, stage.batch_tokens, preference(stage.beta, stage.normalized)
    )
    notes = {**outcome["notes"], "pairs": len(samples) // 2, "data_flops": data_flops(job, sampled)}
    return {**outcome, "flops": outcome["flops"] + reading, "notes": notes}


def run_distill(job: Job) -> Outcome:
    stage: Distill = job.stage
    decoder, tokenizer = job.model(stage.model)
    teachers = {name: _teacher(job, name, tokenizer) for name in dict.fromkeys(stage.teachers.values())}
    rows = [asked for name, share in stage.rows.items() for asked in _owned(job, name, share, tokenizer)]
    if stage.rows and not rows:
        raise LimbeckError(f"there are no rows to learn from; {', '.join(stage.rows)} kept none")
    learner, checkpoint = Learner(decoder, stage.optimizer, stage.steps, stage.recompute), job.checkpoint()
    tasks = job.mixture(stage.problems) if stage.problems else None
    lessons = DistillSampler(
        stage,
        job.seed,
        Engine(decoder, tokenizer, speculate=stage.sampling.speculate),
        tasks,
        params_of(stage.sampling),
        rows,
    )
    state = checkpoint.restore()
    record = job.record(state["step"] if state else 0, stage.steps)
    train_distill(learner, teachers, lessons, stage, record, checkpoint, budget_of(job, stage.rows))
    save_model(decoder, tokenizer, job.folder)
    history = read_metrics(job.folder)
    total = {
        key: sum(row[key] for row in history)
        for key in ("sampled_tokens", "learned_tokens", "flops", "teacher_flops")
    }
    notes = {
        "parameters": decoder.config.parameters,
        "teacher_flops": total["teacher_flops"],
        "data_flops": data_flops(job, stage.rows),
    }
    return {
        "tokens": total["sampled_tokens"] + total["learned_tokens"],
        "flops": total["flops"],
        "notes": notes,
    }


STAGES: dict[str, Callable[[Job], Outcome]] = {
    "label": run_label, "pairs": run_pairs, "dpo": run_preference, "distill": run_distill,
}  # fmt: skip


# ---------------------------------------------------------------- what they learn from


def _teacher(job: Job, name: str, student: Tokenizer) -> Teacher:
    decoder, tokenizer = job.model(name)
    if job.stage.divergence == "text":
        return Teacher(Learner(decoder, Optimizer(), 1), (student, tokenizer))
    require_same_vocabulary(job, student, name, tokenizer)
    return Teacher(Learner(decoder, Optimizer(), 1))


def _pairs_of(job: Job, tokenizer: Tokenizer) -> list[Learned]:
    """The halves of each pair side by side: of stages the very tokens that were sampled, of files the text."""
    rows = [row for name, share in job.stage.pairs.items() for row in _preferred(job, name, share, tokenizer)]
    halves = [[to_sample(_half(row, side), tokenizer, "keep") for side in SIDES] for row in rows]
    return [
        sample
        for number, (better, worse) in enumerate(halves, 1)
        for sample in to_pair(
            better.tokens[: better.start], better.tokens[better.start :], worse.tokens[worse.start :], number
        )
    ]


SIDES = ("chosen", "rejected")


def _preferred(job: Job, name: str, share: float, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if name.endswith(TABLES):
        return share_of([row for _, row in preferences(job, name)], share, (job.seed, Path(name).name))
    return given_rows(job, name, share, tokenizer)


def _half(row: dict[str, Any], side: str) -> dict[str, Any]:
    """One side of a pair as a row of its own; a thought that a table keeps apart stands before its answer again."""
    tokens = {"tokens": row[f"{side}_tokens"]} if f"{side}_tokens" in row else {}
    return {
        "prompt": row["prompt"],
        "completion": join_thought(row.get(f"{side}_reasoning") or "", row[side]),
        **tokens,
    }


def _owned(job: Job, name: str, share: float, tokenizer: Tokenizer) -> Iterator[Asked]:
    """Rows as samples, each with who teaches it: its labels, or the teacher of its problem's domain."""
    stage: Distill = job.stage
    if job.manifest(name)["kind"] == "label":
        yield from ((LABELLED, sample, "") for sample in _labelled_rows(job, name, share, tokenizer))
        return
    for row in given_rows(job, name, share, tokenizer):
        teacher = stage.teachers.get(domain(row["id"]))
        if teacher is None:
            raise LimbeckError(
                f"stages.{job.name}.teachers has none for {domain(row['id'])}, of which {name} has rows"
            )
        yield teacher, to_sample(row, tokenizer, "keep"), row["prompt"]


def _labelled_rows(job: Job, name: str, share: float, tokenizer: Tokenizer) -> list[Learned]:
    require_same_vocabulary(job, tokenizer, name, Tokenizer.from_directory(job.inputs[name] / "tokenizer"))
    at = job.manifest(name)["settings"]["temperature"]
    if at != job.stage.temperature:
        raise LimbeckError(
            f"stages.{job.name}.temperature is {job.stage.temperature:g}, but {name} was labelled at {at:g}; give both the same"
        )
    rows = zip(read(job.inputs[name] / ROWS), _load_labels(job.inputs[name]), strict=True)
    samples = [
        replace(to_sample(row, tokenizer, "keep"), labels=labels)
        for row, labels in rows
        if row["id"] not in job.dropped
    ]
    return share_of(samples, share, (job.seed, name))


# ---------------------------------------------------------------- labels on disk


def _save_labels(folder: Path, shard: int, labels: list[Labels]) -> None:
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(one, name) for one in labels]) for name in ("ids", "logprobs", "tail")
    }
    partial = folder / f"labels-{shard:05d}.partial"
    save_file({**arrays, "lengths": np.array([len(one.tail) for one in labels])}, partial)
    partial.replace(partial.with_suffix(".safetensors"))


def _load_labels(folder: Path) -> Iterator[Labels]:
    for path in sorted(folder.glob("labels-*.safetensors")):
        arrays = load_file(path)
        cuts = np.cumsum(arrays.pop("lengths"))[:-1]
        for ids, logprobs, tail in zip(
            *(np.split(arrays[name], cuts) for name in ("ids", "logprobs", "tail")), strict=True
        ):
            yield Labels(ids, logprobs, tail)
