"""`sft`: supervised fine-tuning on rows."""

from __future__ import annotations

from ...config.recipe import SFT
from ...text.prompt_format import format_of_rows
from ...text.tokenizer import Tokenizer
from ...train.sft import SFTTrainer, plan_epochs
from ...types import LimbeckError
from ..job import Job
from .budget import affordable, budget_of, data_flops
from .outcome import Outcome
from .rows import Row, given_rows, to_sample
from .supervised import attach_adapters, save_model, train


def run(job: Job) -> Outcome:
    """Train on the stage's rows for its number of epochs, or until its FLOP budget is spent."""
    stage: SFT = job.stage
    decoder, tokenizer = job.model(stage.model)
    rows = _rows(job, tokenizer)
    samples = [to_sample(row, tokenizer, stage.thoughts) for row in rows]
    if not samples:
        raise LimbeckError(f"there are no rows to learn from; {', '.join(stage.rows)} kept none")
    plan = plan_epochs(samples, stage.epochs, stage.batch_tokens, job.seed)
    plan = affordable(plan, samples, decoder.config, budget_of(job, stage.rows))
    lora = attach_adapters(job, decoder)
    learner = job.learner(decoder, len(plan), lora)
    result = train(job, SFTTrainer(learner, samples, plan, stage.batch_tokens, stage.log_every))
    tokenizer.prompt_format = format_of_rows(rows)
    save_model(decoder, tokenizer, job.folder, lora)
    result["notes"] |= {"rows": len(samples), "data_flops": data_flops(job, stage.rows)}
    return result


def _rows(job: Job, tokenizer: Tokenizer) -> list[Row]:
    """Return the rows of all inputs, with the system prompt that the stage gives to their input, if any."""
    stage: SFT = job.stage
    systems = stage.system or {}
    rows = []
    for name, share in stage.rows.items():
        given = {"system": systems[name]} if name in systems else {}
        rows += [{**row, **given} for row in given_rows(job, name, share, tokenizer)]
    return rows
