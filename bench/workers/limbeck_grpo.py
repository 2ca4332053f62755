"""One GRPO step a turn: the very loop of `limbeck run`, with a trivial reward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from turns import SETTINGS, Clock, turns

from limbeck.config.parts import Optimizer, Policy
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.text.tokenizer import Tokenizer
from limbeck.train.batch import pack, to_samples
from limbeck.train.grpo import group_advantages
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient
from limbeck.types import Problem

torch.set_num_threads(SETTINGS["threads"])
tokenizer = Tokenizer.from_directory(Path(SETTINGS["model"]))
decoder = weights.load(Path(SETTINGS["model"]))
sampling = SamplingParams(max_new_tokens=SETTINGS["new"], stop_ids=tuple(SETTINGS["stop"]))
if SETTINGS["fixed"]:
    tokenizer.end_id = decoder.config.vocab_size  # never said
policy = Policy(
    group_size=SETTINGS["group"],
    prompts_per_step=SETTINGS["prompts"],
    zero_variance="keep",
    mask_truncated=False,
)
learner = Learner(decoder, Optimizer(learning_rate=1e-6), 1000)
engine, loss = Engine(decoder, tokenizer), PolicyGradient(policy, SETTINGS["new"])
problems = [Problem(str(i), text) for i, text in enumerate(SETTINGS["texts"])]

for step, clock in enumerate(turns()):
    groups = engine.rollout(problems, SETTINGS["group"], sampling, step)
    sampled = Clock()
    groups = [
        replace(group, rewards=tuple(float(c.tokens[0] % 7) for c in group.completions)) for group in groups
    ]
    samples = to_samples(groups, group_advantages(groups, policy.advantage_scale), False)
    learner.update(pack(samples, SETTINGS["batch_tokens"]), loss)
    engine.load_weights(learner.weights())
    tokens = sum(len(c.tokens) for g in groups for c in g.completions)
    clock.say(rollout=sampled.wall - clock.wall, tokens=tokens)
