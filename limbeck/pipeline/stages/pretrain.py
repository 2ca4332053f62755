"""`pretrain`: train a new decoder on the generated corpus of a miniature problem source (a small synthetic
task of this package)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from ...config.recipe import Pretrain
from ...model.decoder import Decoder
from ...model.from_recipe import to_config
from ...run_log import prepare
from ...train.learner import Learner
from ...train.sft import SFTTrainer, batches
from ...types import fingerprint
from ..job import Job
from .outcome import Outcome
from .supervised import save_model, train

PROGRESS = 1.0  # seconds between two reports of the corpus' progress


def run(job: Job) -> Outcome:
    """Generate the corpus, then train one epoch on it."""
    stage: Pretrain = job.stage
    from ...tasks.clock_countdown import encode_documents

    task = job.task(stage.problems)
    tokenizer = task.tokenizer()
    decoder = Decoder(to_config(stage.shape, tokenizer.size)).initialize(fingerprint(job.seed, "weights"))
    job.place(decoder)
    if stage.fp8:
        from ...model.fp8 import simulate

        simulate(decoder)
    corpus = with_progress(job.folder, task.documents(job.seed, stage.corpus), stage.tokens)
    documents = encode_documents(corpus, tokenizer, stage.tokens)
    prepare(job.folder, "at work")
    plan = batches(documents, stage.batch_tokens, job.seed)
    learner = Learner(decoder, stage.optimizer, len(plan), getattr(stage, "recompute", False))
    whole_batch = 4 * stage.batch_tokens  # tokens: a batch is one micro-batch
    result = train(job, SFTTrainer(learner, documents, plan, whole_batch, stage.log_every))
    save_model(decoder, tokenizer, job.folder)
    return result


def with_progress(folder: Path, documents: Iterator[list[str]], tokens: int) -> Iterator[list[str]]:
    """Yield the documents unchanged. About once a second, the share of `tokens` generated so far is written
    to the stage's folder as a message for the user."""
    written = 0
    noted = time.monotonic()
    for words in documents:
        yield words
        written += len(words)
        if time.monotonic() - noted > PROGRESS:
            prepare(folder, f"writes its corpus, {written / tokens:.0%}")
            noted = time.monotonic()
