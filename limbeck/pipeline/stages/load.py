"""`load`: copy a base model into the store as float32 safetensors, and note its licence and its source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...config.recipe import Load
from ...model import peft, weights
from ...model.decoder import Decoder
from ...model.pruning import block_influence, evenly_spaced, keep_layers, most_influential
from ...text.tokenizer import Tokenizer
from ...train.overflow import finite, spoiled
from ...types import LimbeckError
from ..job import Job
from .outcome import Outcome, outcome
from .rows import given_rows, to_sample
from .supervised import save_model

READ = 64  # rows that are read to measure the layers' influence, at most


def run(job: Job) -> Outcome:
    """Read a model directory or a GGUF file, merge the adapter if one is set, check the model, reduce it to
    the layers of the setting `layers`, and save it.

    Raises LimbeckError if the tokenizer has more tokens than the model's vocabulary, `eos_token` is not one
    of them, or a weight is not finite.
    """
    stage: Load = job.stage
    source = _directory(Path(stage.path), job.folder / "converted")
    tokenizer = read_tokenizer(stage, source)
    decoder = weights.load(source)
    if tokenizer.size > decoder.config.vocab_size:
        raise LimbeckError(
            f"{source}: the tokenizer knows {tokenizer.size} tokens, the model only "
            f"{decoder.config.vocab_size}; they are not of one model"
        )
    if stage.adapter:
        peft.merge(decoder, Path(stage.adapter))
    if not finite(decoder.parameters()):
        name = spoiled(decoder.named_parameters())
        raise LimbeckError(f"{source}: the weight {name} is not finite; copy the model again from its source")
    notes = {}
    if stage.layers:
        layers, notes = _choose_layers(job, decoder, tokenizer)
        decoder = keep_layers(decoder, layers)
    save_model(decoder, tokenizer, job.folder)
    shutil.rmtree(job.folder / "converted", ignore_errors=True)
    return outcome(parameters=decoder.config.parameters, **notes, **_provenance(source))


def _choose_layers(job: Job, decoder: Decoder, tokenizer: Tokenizer) -> tuple[list[int], dict[str, Any]]:
    """Return the numbers of the layers to keep, and notes for the manifest: with the setting `rows`, these
    numbers and the influence of every layer."""
    stage: Load = job.stage
    if isinstance(stage.layers, list):
        return stage.layers, {}
    if stage.rows is None:
        return evenly_spaced(stage.layers, decoder.config.layers), {}
    rows = given_rows(job, stage.rows, 1.0, tokenizer)[:READ]
    if not rows:
        raise LimbeckError(f"stages.{job.name}.rows: {stage.rows} kept none; ask for more rows there")
    influence = block_influence(decoder, [to_sample(row, tokenizer, "keep").tokens for row in rows])
    layers = most_influential(influence, stage.layers)
    return layers, {"layers": layers, "influence": [round(value, 4) for value in influence]}


def read_tokenizer(stage: Load, source: Path) -> Tokenizer:
    """Return the tokenizer of a model directory, with the chat template and the end-of-turn token that the
    stage gives it."""
    tokenizer = Tokenizer.from_directory(source, plain=stage.chat_template == "plain")
    return tokenizer if stage.eos_token is None else tokenizer.ending_with(stage.eos_token)


def _directory(source: Path, converted: Path) -> Path:
    """Return the directory of a model. A GGUF file is first converted to one at `converted`."""
    if not source.is_file():
        return source
    from ...model import gguf

    gguf.read(source, converted)
    return converted


def _provenance(source: Path) -> dict[str, str]:
    """Return the source and licence that `limbeck pull` saved beside the model, else the directory's name as
    the source."""
    notes = source / "provenance.json"
    if notes.exists():
        return json.loads(notes.read_text(encoding="utf-8"))
    return {"source": str(source.name)}
