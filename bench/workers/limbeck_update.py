"""One update a turn on a fixed batch of groups: pack, forward, backward, optimiser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from turns import SETTINGS, turns

from limbeck.config.parts import Optimizer, Policy
from limbeck.model import weights
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient
from limbeck.types import Sample

torch.set_num_threads(SETTINGS["threads"])
decoder = weights.load(Path(SETTINGS["model"]))
learner, loss = (
    Learner(decoder, Optimizer(learning_rate=1e-6), 1000),
    PolicyGradient(Policy(), SETTINGS["new"]),
)
random, width = np.random.default_rng(0), SETTINGS["width"]
samples = []
for _ in range(SETTINGS["prompts"]):
    prompt = random.integers(0, decoder.config.vocab_size, width)
    for length in SETTINGS["lengths"]:
        tokens = np.concatenate([prompt, random.integers(0, decoder.config.vocab_size, length)])
        samples.append(
            Sample(tokens, width, float(random.standard_normal()), np.full(length, -6.0, np.float32))
        )

for clock in turns():
    learner.update(pack(samples, SETTINGS["batch_tokens"]), loss)
    clock.say(tokens=sum(len(s.tokens) for s in samples))
