"""`dpo`: direct preference optimisation on preference pairs from a stage or from a table file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config.learned_rewards import TABLES
from ...config.methods import DPO as Settings
from ...config.recipe import cited_rows
from ...text.prompt_format import format_of_rows
from ...text.reasoning_parser import join_thought
from ...text.tokenizer import Tokenizer
from ...train.batch import MICRO_TOKENS
from ...train.dpo import DPO, to_pair, with_reference_logprobs
from ...train.pairs import plan_by_tokens
from ...train.scorer import Scorer
from ...train.sft import SFTTrainer
from ...types import LimbeckError, Sample
from ..dataset_rows import take_share
from ..job import Job
from .budget import affordable, budget_of, data_flops, forward_flops
from .outcome import Outcome
from .rows import given_rows, preferences, to_sample
from .supervised import attach_adapters, save_model, train


def run(job: Job) -> Outcome:
    """Compute the reference log-probabilities of the pairs with the initial policy, then train. The FLOPs of
    the former are counted too."""
    stage: Settings = job.stage
    decoder, tokenizer = job.model(stage.model)
    rows = [row for name, share in stage.pairs.items() for row in _rows(job, name, share, tokenizer)]
    samples = _samples(rows, tokenizer)
    if not samples:
        raise LimbeckError(f"there are no pairs to learn from; {', '.join(stage.pairs)} kept none")
    reference_flops = forward_flops(samples, decoder.config)
    samples = with_reference_logprobs(Scorer(decoder), samples, MICRO_TOKENS)
    plan = plan_by_tokens(samples, stage.epochs, stage.batch_tokens, job.seed)
    sampled = cited_rows(*stage.pairs)
    plan = affordable(plan, samples, decoder.config, budget_of(job, sampled) - reference_flops)
    lora = attach_adapters(job, decoder)
    learner = job.learner(decoder, len(plan), lora)
    loss = DPO(stage.beta, stage.normalized)
    result = train(job, SFTTrainer(learner, samples, plan, stage.batch_tokens, stage.log_every, loss))
    tokenizer.prompt_format = format_of_rows(rows)
    save_model(decoder, tokenizer, job.folder, lora)
    result["flops"] += reference_flops
    result["notes"] |= {"pairs": len(samples) // 2, "data_flops": data_flops(job, sampled)}
    return result


def _samples(rows: list[dict[str, Any]], tokenizer: Tokenizer) -> list[Sample]:
    """Return the two responses of each pair, one after the other. Pairs from stages keep their sampled token
    ids; the texts of table files are tokenized."""
    samples = []
    for number, row in enumerate(rows, start=1):
        chosen = to_sample(_response(row, "chosen"), tokenizer, "keep")
        rejected = to_sample(_response(row, "rejected"), tokenizer, "keep")
        prompt = chosen.tokens[: chosen.start]
        responses = [side.tokens[side.start :] for side in (chosen, rejected)]
        samples += to_pair(prompt, *responses, number)
    return samples


def _rows(job: Job, name: str, share: float, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return a share of the pairs of `name`, which is a table file or a stage."""
    if name.endswith(TABLES):
        return take_share([row for _, row in preferences(job, name)], share, (job.seed, Path(name).name))
    return given_rows(job, name, share, tokenizer)


def _response(row: dict[str, Any], side: str) -> dict[str, Any]:
    """Return one response of a pair (`side` is "chosen" or "rejected") as a row. If a table has the thought
    in its own column, it is put before the answer."""
    response = {
        "prompt": row["prompt"],
        "system": row.get("system") or "",
        "completion": join_thought(row.get(f"{side}_reasoning") or "", row[side]),
    }
    if f"{side}_tokens" in row:
        response["tokens"] = row[f"{side}_tokens"]
    return response
