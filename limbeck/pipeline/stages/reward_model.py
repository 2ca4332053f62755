"""`reward`: train a reward model on preference pairs, and measure it on held-out prompts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from safetensors.torch import save_file

from ...activity import track
from ...config.learned_rewards import Reward
from ...eval.statistics import mean_interval
from ...tasks.judge import final
from ...train.pairs import plan_by_count
from ...train.reward_model import BradleyTerry, RewardModelLearner, split, to_samples
from ...train.sft import SFTTrainer
from ...types import LimbeckError, Sample
from ..job import Job
from ..store import write
from .calibrate import MIN_PAIRS
from .outcome import Outcome
from .rewards import MEASURED, VALUE
from .rows import preferences
from .supervised import attach_adapters, save_model, train


def run(job: Job) -> Outcome:
    """Train the decoder with a value head; save both, and the accuracy on held-out pairs.

    Raises LimbeckError if there are too few pairs.
    """
    stage: Reward = job.stage
    decoder, tokenizer = job.model(stage.model)
    rows = [row for _, row in preferences(job, stage.rows) if final(row["chosen"]) != final(row["rejected"])]
    learned, held_out = split(rows, stage.held_out, job.seed) if rows else ([], [])
    if min(len(learned), len(held_out)) < MIN_PAIRS:
        raise LimbeckError(
            f"stages.{job.name}.rows: {len(learned)} pairs to learn from and {len(held_out)} held out "
            f"are too few ({MIN_PAIRS} of either at least); give more, or change held_out"
        )
    samples = to_samples(tokenizer, learned)
    plan = plan_by_count(len(learned), stage.epochs, stage.batch_pairs, job.seed)
    lora = attach_adapters(job, decoder)
    learner = RewardModelLearner(decoder, stage.optimizer, len(plan), lora, seed=job.seed)
    trainer = SFTTrainer(
        learner, samples, plan, stage.batch_tokens, stage.log_every, BradleyTerry(), frozenset(["entropy"])
    )
    result = train(job, trainer)
    measured = _measure(learner, samples, to_samples(tokenizer, held_out))
    save_file({"value.weight": decoder.value.weight.detach().contiguous()}, job.folder / VALUE)
    del decoder.value
    save_model(decoder, tokenizer, job.folder, lora)
    write(job.folder / MEASURED, json.dumps(measured, indent=2) + "\n")
    result["notes"] = {"parameters": decoder.config.parameters, "pairs": len(learned), **measured}
    return result


def _measure(learner: RewardModelLearner, learned: list[Sample], held_out: list[Sample]) -> dict[str, Any]:
    """Return the accuracy on held-out pairs with its interval, the mean margin between chosen and rejected
    there, and `centre`, the mean value of all training responses. In both lists, chosen and rejected
    responses alternate."""
    parts = track([held_out[::2], held_out[1::2], learned], "measuring", "sets of responses")
    chosen, rejected, of_learned = [learner.values(part) for part in parts]
    correct = [[float(better > worse)] for better, worse in zip(chosen, rejected, strict=True)]
    centre = of_learned.mean()
    return {
        "accuracy": asdict(mean_interval(correct)),
        "centre": float(centre),
        "margin": float((chosen - rejected).mean()),
    }
