"""`pretrain`: train a new decoder on the generated corpus of a miniature problem source (a small synthetic
task of this package)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from ...activity import phase
from ...config.recipe import Pretrain
from ...model.decoder import Decoder
from ...model.from_recipe import to_config
from ...model.weights import digest
from ...train.sft import SFTTrainer, batches
from ...types import fingerprint
from ..job import Job
from .outcome import Outcome
from .supervised import save_model, train


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
    with closing(with_progress(task.documents(job.seed, stage.corpus), stage.tokens)) as corpus:
        documents = encode_documents(corpus, tokenizer, stage.tokens)
    plan = batches(documents, stage.batch_tokens, job.seed)
    initial = digest(decoder)
    learner = job.learner(decoder, len(plan))
    whole_batch = 4 * stage.batch_tokens  # tokens: a batch is one micro-batch
    result = train(job, SFTTrainer(learner, documents, plan, whole_batch, stage.log_every))
    save_model(decoder, tokenizer, job.folder)
    result["notes"]["weights_changed"] = digest(decoder) != initial
    return result


def with_progress(documents: Iterator[list[str]], tokens: int) -> Iterator[list[str]]:
    """Yield the documents unchanged, in a phase that counts their tokens, of which `tokens` are wanted."""
    with phase("writing the corpus", "tokens", tokens) as written:
        for words in documents:
            yield words
            written.advance(len(words))
