"""One SFT update a turn over documents of mixed lengths."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from turns import SETTINGS, turns

from limbeck.config.parts import Optimizer
from limbeck.model import weights
from limbeck.text.tokenizer import Tokenizer
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.types import Sample

torch.set_num_threads(SETTINGS["threads"])
tokenizer = Tokenizer.from_directory(Path(SETTINGS["model"]))
learner = Learner(weights.load(Path(SETTINGS["model"])), Optimizer(learning_rate=1e-6), 1000)
documents = [Sample(np.array(tokenizer.encode(text)), 0) for text in SETTINGS["texts"]]
batches = [documents[i : i + SETTINGS["batch"]] for i in range(0, len(documents), SETTINGS["batch"])]

for clock, batch in zip(turns(), cycle(batches)):
    learner.update(pack(batch, SETTINGS["batch_tokens"]), CrossEntropy())
    tokens = sum(len(sample.tokens) - 1 for sample in batch)
    clock.say(tokens=tokens, tokens_per_second=tokens / clock.elapsed())
