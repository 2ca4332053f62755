"""Code shared by pretraining, SFT, DPO and reward models: training along a plan of batches with resuming, and
saving the model."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...model import peft, weights
from ...model.decoder import Decoder
from ...model.lora import LoRA
from ...run_log import METRICS
from ...text.tokenizer import Tokenizer
from ...train.sft import SFTTrainer
from ..job import Job
from .outcome import Outcome, outcome


def train(job: Job, trainer: SFTTrainer) -> Outcome:
    """Run a trainer from its last checkpoint to its end. Return the tokens and FLOPs of the whole plan, those
    before the checkpoint included."""
    checkpoint = job.checkpoint()
    if state := checkpoint.restore():
        trainer.load_state_dict(state)
        del state  # as large as the weights and their moments
    log = job.record(trainer.learner.step, len(trainer.plan))
    log.drop_last(METRICS, trainer.log_every)
    trainer.train(log, checkpoint)
    checkpoint.finish(trainer.state_dict, log)
    config = trainer.learner.model.config
    lengths = [len(trainer.samples[i].tokens) for batch in trainer.plan for i in batch]
    tokens = sum(lengths)
    flops = tokens * config.flops_per_token(tokens / len(lengths) / 2, backward=True)
    return outcome(tokens, flops, parameters=config.parameters)


def attach_adapters(job: Job, decoder: Decoder) -> LoRA | None:
    """Attach the adapters that the stage's setting `lora` asks for; None without the setting."""
    settings = job.stage.lora
    return LoRA(decoder, settings, job.seed) if settings else None


def save_model(decoder: Decoder, tokenizer: Tokenizer, folder: Path, lora: LoRA | None = None) -> None:
    """Write the weights, the configuration and the tokenizer to `model/` in the folder, replacing what was
    there. With `lora`, the weights are the merged ones, and the adapters are written to `adapter/`."""
    directory = folder / "model"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    weights.save(decoder, directory, tokenizer)
    tokenizer.save(directory)
    if lora:
        peft.save(lora, folder / "adapter")
