"""`calibrate`: measure how well an LLM judge agrees with labelled pairs, before it may be used as a
reward."""

from __future__ import annotations

import json

from ...activity import track
from ...config.learned_rewards import Calibrate
from ...engine.sampling import to_sampling_params
from ...eval.judge_calibration import calibrate, labelled, pairs_from_scores
from ...tasks.judge import Pair, final
from ...types import LimbeckError, Problem
from ..job import Job
from ..store import write
from .outcome import Outcome, outcome
from .rewards import CALIBRATION, open_judge
from .rows import preferences

MIN_PAIRS = 20  # pairs: fewer show nothing
NOTED = ("pairs", "agreement", "kappa", "position", "length", "abstained", "passed", "refusals")


def run(job: Job) -> Outcome:
    """Measure the judge's agreement with labels and write it to `calibration.json`. A judge below the
    thresholds is a valid result, but a stage that uses that judge fails.

    Raises LimbeckError if there are fewer than `MIN_PAIRS` pairs.
    """
    stage: Calibrate = job.stage
    pairs, tokens, flops = _labelled(job) if stage.rows else _by_truth(job)
    if len(pairs) < MIN_PAIRS:
        remedy = "raise pairs or samples, or take a model that is sometimes right and sometimes wrong"
        if stage.rows:
            remedy = "label more rows"
        raise LimbeckError(
            f"stages.{job.name}: {len(pairs)} labelled pairs are too few to measure a judge by "
            f"({MIN_PAIRS} at least); {remedy}"
        )
    judge = open_judge(job, stage.judge, stage.judging)
    result = calibrate(judge, pairs, stage.bar, job.seed)
    settings = {
        "judge": stage.judge,
        "digest": job.manifest(stage.judge)["digest"],
        "judging": stage.judging.model_dump(mode="json"),
    }
    text = json.dumps({**result, **settings}, indent=2, ensure_ascii=False)
    write(job.folder / CALIBRATION, text + "\n")
    usage = judge.take_usage()
    notes = {name: result[name] for name in NOTED}
    notes["canaries"] = result["canaries"]["share"]
    return outcome(tokens + usage["judge_tokens"], flops + usage["judge_flops"], **notes, **usage)


def _labelled(job: Job) -> tuple[list[Pair], int, float]:
    """Return (the first pairs that people labelled, at most the setting `pairs`; 0 tokens; 0 FLOPs). The
    thoughts in the responses are removed."""
    pairs = []
    for number, row in preferences(job, job.stage.rows):
        problem = Problem(f"row/{number}", row["prompt"], answer=row.get("answer"))
        chosen = final(row["chosen"])
        rejected = final(row["rejected"])
        if chosen != rejected:
            pairs.append(labelled(problem, chosen, rejected, (job.seed, number)))
    return pairs[: job.stage.pairs], 0, 0.0


def _by_truth(job: Job) -> tuple[list[Pair], int, float]:
    """Return (pairs of a right and a wrong response, tokens sampled, FLOPs of sampling). The responses are
    sampled from the stage's `model`; the task's own checker decides which one is right."""
    stage: Calibrate = job.stage
    engine = job.sampler(stage.model)
    tasks = job.mixture(stage.problems)
    problems = tasks.draw(4 * stage.pairs, (job.seed, "prompts"))
    sampling = to_sampling_params(stage.sampling)
    pairs: list[Pair] = []
    lengths: list[int] = []
    for i in range(0, len(problems), stage.pairs):
        rollout = engine.rollout(problems[i : i + stage.pairs], stage.samples, sampling, job.seed)
        groups = [tasks.score(group) for group in track(rollout, "scoring", "problems")]
        lengths += [len(completion.tokens) for group in groups for completion in group.completions]
        pairs += pairs_from_scores(groups, job.seed)
        if len(pairs) >= stage.pairs:
            break
    tokens = sum(lengths)
    flops = tokens * engine.model.config.flops_per_token(tokens / len(lengths) / 2)
    return pairs[: stage.pairs], tokens, flops
