"""One DPO step a turn: pairs that share their prompt, scored by the reference before."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import torch
from turns import SETTINGS, turns

from limbeck.config.parts import Optimizer
from limbeck.model import weights
from limbeck.text.tokenizer import Tokenizer
from limbeck.train.batch import pack
from limbeck.train.dpo import DPO, to_pair, with_reference_logprobs
from limbeck.train.learner import Learner

torch.set_num_threads(SETTINGS["threads"])
tokenizer = Tokenizer.from_directory(Path(SETTINGS["model"]))
learner, loss = (
    Learner(weights.load(Path(SETTINGS["model"])), Optimizer(learning_rate=1e-6), 1000),
    DPO(0.1),
)
rows = zip(SETTINGS["texts"], SETTINGS["chosen"], SETTINGS["rejected"], strict=True)
halves = [
    half
    for number, (asked, better, worse) in enumerate(rows, 1)
    for half in to_pair(
        tokenizer.prompt(asked), tokenizer.response(better), tokenizer.response(worse), number
    )
]
samples = with_reference_logprobs(learner, halves, SETTINGS["batch_tokens"])
width = 2 * SETTINGS["pairs"]
batches = [samples[i : i + width] for i in range(0, len(samples), width)]

for clock, batch in zip(turns(), cycle(batches)):
    said = learner.update(pack(batch, SETTINGS["batch_tokens"]), loss)
    clock.say(tokens=sum(len(s.tokens) for s in batch), loss=said["loss"])
