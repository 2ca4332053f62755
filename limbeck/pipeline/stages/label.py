"""`label`: store a teacher's top-k log-probabilities at each response token of some rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from ...config.methods import Label
from ...files import atomic_write
from ...train.distill import teacher_top_k
from ...train.scorer import Scorer
from ...types import Labels
from ..dataset_rows import ROWS
from ..job import Job
from ..review import curate
from .budget import data_flops, forward_flops
from .chunks import remaining_chunks
from .outcome import Outcome, outcome
from .rows import given_rows, to_sample, tokenizer_digest

SHARD = 256  # rows whose labels are in one file
ARRAYS = ("ids", "logprobs", "tail")  # fields of Labels


def run(job: Job) -> Outcome:
    """Label the rows in shards of `SHARD` rows. The rows and the tokenizer are copied into the result, so
    that the labels can be used without the inputs."""
    stage: Label = job.stage
    decoder, tokenizer = job.model(stage.model)
    teacher = Scorer(decoder)
    rows = []
    for name, share in stage.rows.items():
        rows += given_rows(job, name, share, tokenizer)
    samples = [to_sample(row, tokenizer, "keep") for row in rows]
    shards = [samples[i : i + SHARD] for i in range(0, len(samples), SHARD)]
    for number, log in remaining_chunks(job, len(shards)):
        labels = teacher_top_k(teacher, shards[number], stage.top_k, stage.temperature, stage.batch_tokens)
        save_labels(job.folder, number, labels)
        tail = np.concatenate([one.tail for one in labels])
        log.step(number, {"labelled_tokens": len(tail), "known_mass": float(np.mean(1 - np.exp(tail)))})
    curate.write_rows(job.folder / ROWS, [_with_tokens(row, s) for row, s in zip(rows, samples, strict=True)])
    (job.folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(job.folder / "tokenizer")
    flops = forward_flops(samples, decoder.config)
    return outcome(
        sum(len(sample.tokens) for sample in samples),
        flops,
        rows=len(rows),
        tokenizer=tokenizer_digest(tokenizer),
        data_flops=data_flops(job, stage.rows),
        teacher_flops=flops,
    )


def _with_tokens(row: dict[str, Any], sample: Any) -> dict[str, Any]:
    """Return the row with the response token ids that were labelled."""
    return {**row, "tokens": sample.tokens[sample.start :].tolist()}


def save_labels(folder: Path, shard: int, labels: list[Labels]) -> None:
    """Write the labels of one shard to a safetensors file: each array concatenated over all samples, and the
    number of tokens of each sample. `shard` is the shard's number."""
    arrays = {name: np.concatenate([getattr(one, name) for one in labels]) for name in ARRAYS}
    arrays["lengths"] = np.array([len(one.tail) for one in labels])
    with atomic_write(folder / f"labels-{shard:05d}.safetensors") as file:
        file.write(save(arrays))


def load_labels(folder: Path) -> Iterator[Labels]:
    """Yield the labels of each sample, in the order of the rows."""
    for path in sorted(folder.glob("labels-*.safetensors")):
        arrays = load_file(path)
        ends = np.cumsum(arrays["lengths"])[:-1]
        columns = [np.split(arrays[name], ends) for name in ARRAYS]
        for ids, logprobs, tail in zip(*columns, strict=True):
            yield Labels(ids, logprobs, tail)
