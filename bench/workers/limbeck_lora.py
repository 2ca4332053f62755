"""One update a turn, of all weights or of adapters, on a fixed batch of groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from turns import SETTINGS, turns

from limbeck.config.parts import LoRA as Settings
from limbeck.config.parts import Optimizer, Policy
from limbeck.model import weights
from limbeck.model.lora import LoRA
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient
from limbeck.train.scorer import Scorer
from limbeck.types import Sample

torch.set_num_threads(SETTINGS["threads"])
decoder = weights.load(Path(SETTINGS["model"]))
lora = LoRA(decoder, Settings(rank=SETTINGS["rank"]), 0) if SETTINGS["rank"] else None
learner = Learner(decoder, Optimizer(learning_rate=1e-6), 1000, lora=lora)
loss = PolicyGradient(Policy(), SETTINGS["new"])
reference = None
if SETTINGS["reference"]:
    reference = Scorer(lora.base() if lora else weights.load(Path(SETTINGS["model"])))
random = np.random.default_rng(0)
width = SETTINGS["width"]
samples = []
for _ in range(SETTINGS["prompts"]):
    prompt = random.integers(0, decoder.config.vocab_size, width)
    for length in SETTINGS["lengths"]:
        tokens = np.concatenate([prompt, random.integers(0, decoder.config.vocab_size, length)])
        advantage = float(random.standard_normal())
        samples.append(Sample(tokens, width, advantage, np.full(length, -6.0, np.float32)))


def saved_mib() -> float:
    """Return the size of a checkpoint, in MiB."""
    numbers = [*learner.state_dict()["model"].values()]
    for part in learner.optimizer.parts:
        numbers += [value for state in part.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in numbers) / 2**20


for clock in turns():
    batches = pack(samples, SETTINGS["batch_tokens"])
    if reference:
        reference.logprobs(batches)
    learner.update(batches, loss)
    clock.say(tokens=sum(len(s.tokens) for s in samples), checkpoint_mib=saved_mib())
