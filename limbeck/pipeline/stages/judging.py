"""Stages that make opinions fit to be used: a judge is calibrated, a reward model is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ...config.learned_rewards import TABLES, Calibrate, Reward
from ...engine.sampling import params_of
from ...eval.judge_calibration import by_truth, calibrate, labelled
from ...eval.statistics import mean_interval
from ...run_log import read
from ...tasks.files import read_table
from ...tasks.judge import Pair, final
from ...text.tokenizer import Tokenizer
from ...train.reward_model import RewardModelLearner, fit, plan_pairs, split, to_sample
from ...types import LimbeckError, Problem, Sample
from ..dataset_rows import ROWS
from ..job import Job
from ..store import write
from .basic import Outcome, save_model
from .rewards import CALIBRATION, MEASURED, VALUE, open_judge

FEWEST = 20  # pairs: fewer show nothing


def run_calibrate(job: Job) -> Outcome:
    """A judge's numbers on labelled pairs. Failing the bar is a result; whoever cites it as a reward is refused."""
    stage: Calibrate = job.stage
    pairs, tokens, flops = _labelled(job) if stage.rows else _by_truth(job)
    if len(pairs) < FEWEST:
        raise LimbeckError(
            f"stages.{job.name}: {len(pairs)} labelled pairs are too few to measure a judge by ({FEWEST} at least); "
            f"{'label more rows' if stage.rows else 'raise pairs or samples, or take a model that is sometimes right and sometimes wrong'}"
        )
    judge = open_judge(job, stage.judge, stage.judging)
    told = calibrate(judge, pairs, stage.bar, job.seed)
    whose = {
        "judge": stage.judge,
        "digest": job.manifest(stage.judge)["digest"],
        "judging": stage.judging.model_dump(mode="json"),
    }
    write(job.folder / CALIBRATION, json.dumps({**told, **whose}, indent=2, ensure_ascii=False) + "\n")
    bill = judge.bill()
    notes = {
        name: told[name]
        for name in ("pairs", "agreement", "kappa", "position", "length", "abstained", "passed", "refusals")
    }
    notes |= {"canaries": told["canaries"]["share"], **bill}
    return {"tokens": tokens + bill["judge_tokens"], "flops": flops + bill["judge_flops"], "notes": notes}


def _labelled(job: Job) -> tuple[list[Pair], int, float]:
    """People's labels, the first `pairs` of them. What was thought is not judged."""
    pairs = []
    for number, row in preferences(job, job.stage.rows):
        texts = final(row["chosen"]), final(row["rejected"])
        problem = Problem(f"row/{number}", row["prompt"], answer=row.get("answer"))
        if texts[0] != texts[1]:
            pairs.append(labelled(problem, *texts, (job.seed, number)))
    return pairs[: job.stage.pairs], 0, 0.0


def _by_truth(job: Job) -> tuple[list[Pair], int, float]:
    """Pairs of a right and a wrong response of `model`, told apart by the task's own checker."""
    stage: Calibrate = job.stage
    engine, tasks = job.sampler(stage.model), job.mixture(stage.problems)
    problems = tasks.draw(4 * stage.pairs, (job.seed, "prompts"))
    pairs, lengths = [], []
    for i in range(0, len(problems), stage.pairs):
        groups = [
            tasks.score(g)
            for g in engine.rollout(
                problems[i : i + stage.pairs], stage.samples, params_of(stage.sampling), job.seed
            )
        ]
        lengths += [len(c.tokens) for group in groups for c in group.completions]
        pairs += by_truth(groups, job.seed)
        if len(pairs) >= stage.pairs:
            break
    flops = sum(lengths) * engine.model.config.flops_per_token(sum(lengths) / len(lengths) / 2)
    return pairs[: stage.pairs], sum(lengths), flops


def run_reward(job: Job) -> Outcome:
    """Learn values from preferences, and measure them on questions that were kept out."""
    stage: Reward = job.stage
    decoder, tokenizer = job.model(stage.model)
    rows = [row for _, row in preferences(job, stage.rows) if final(row["chosen"]) != final(row["rejected"])]
    learned, kept = split(rows, stage.held_out, job.seed) if rows else ([], [])
    if min(len(learned), len(kept)) < FEWEST:
        raise LimbeckError(
            f"stages.{job.name}.rows: {len(learned)} pairs to learn from and {len(kept)} held out are too few ({FEWEST} of either at "
            "least); give more, or change held_out"
        )
    pairs = [_halves(row, tokenizer) for row in learned]
    plan, checkpoint = plan_pairs(len(pairs), stage.epochs, stage.batch_pairs, job.seed), job.checkpoint()
    learner = RewardModelLearner(decoder, stage.optimizer, len(plan))
    if state := checkpoint.restore():
        learner.load_state_dict(state["learner"])
    fit(
        learner,
        pairs,
        plan,
        stage.batch_tokens,
        stage.log_every,
        job.record(learner.step, len(plan)),
        checkpoint,
    )
    told = _measured(learner, pairs, [_halves(row, tokenizer) for row in kept])
    save_file({"value.weight": decoder.value.weight.detach().contiguous()}, job.folder / VALUE)
    del decoder.value
    save_model(decoder, tokenizer, job.folder)
    write(job.folder / MEASURED, json.dumps(told, indent=2) + "\n")
    tokens = sum(len(half.tokens) for batch in plan for i in batch for half in pairs[i])
    count = sum(2 * len(batch) for batch in plan)
    flops = tokens * decoder.config.flops_per_token(tokens / count / 2, backward=True)
    return {
        "tokens": tokens,
        "flops": flops,
        "notes": {"parameters": decoder.config.parameters, "pairs": len(pairs), **told},
    }


def _halves(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[Sample, Sample]:
    return to_sample(tokenizer, row["prompt"], row["chosen"]), to_sample(
        tokenizer, row["prompt"], row["rejected"]
    )


def _measured(
    learner: RewardModelLearner, learned: list[tuple[Sample, Sample]], kept: list[tuple[Sample, Sample]]
) -> dict[str, Any]:
    """Accuracy on held-out pairs with its interval, and where the middle of the values is."""
    better, worse = (learner.values([pair[half] for pair in kept]) for half in (0, 1))
    middle = learner.values([half for pair in learned for half in pair]).mean()
    accuracy = mean_interval([[float(b > w)] for b, w in zip(better, worse, strict=True)])
    return {"accuracy": asdict(accuracy), "centre": float(middle), "margin": float((better - worse).mean())}


def preferences(job: Job, rows: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows with `prompt`, `chosen` and `rejected`, from a table or from a stage; one that lacks any is an error."""
    table = rows.endswith(TABLES)
    found = read_table(Path(rows)) if table else enumerate(read(job.inputs[rows] / ROWS), start=1)
    for number, row in found:
        if row.get("id") in job.dropped:
            continue
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(name), str):
                where = f"{rows}, line {number}" if table else f"stages.{rows}, row {number}"
                raise LimbeckError(
                    f"{where}: {name} is missing or no text; rows of preferences have prompt, chosen and rejected"
                )
        yield number, dict(row)


STAGES = {"calibrate": run_calibrate, "reward": run_reward}
