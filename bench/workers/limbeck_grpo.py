"""One GRPO step a turn: the very loop of `limbeck run`, with a trivial reward."""

from __future__ import annotations

from pathlib import Path

import torch
from turns import SETTINGS, Clock, say, wait

from limbeck.engine.engine import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.parts import Optimizer, Policy
from limbeck.tokenizer import Tokenizer
from limbeck.train.batch import pack, to_samples
from limbeck.train.learner import Learner
from limbeck.train.losses import policy_gradient
from limbeck.types import Problem

torch.set_num_threads(SETTINGS["threads"])
tokenizer = Tokenizer.from_directory(Path(SETTINGS["model"]))
decoder = weights.load(Path(SETTINGS["model"]))
sampling = SamplingParams(max_new_tokens=SETTINGS["new"], stop_ids=tuple(SETTINGS["stop"]))
if SETTINGS["fixed"]:
    tokenizer.end_id = decoder.config.vocab_size  # never said
policy = Policy(group_size=SETTINGS["group"], prompts_per_step=SETTINGS["prompts"], zero_variance="keep", mask_truncated=False)
learner = Learner(decoder, Optimizer(learning_rate=1e-6), 1000)
engine, loss = Engine(decoder, tokenizer), policy_gradient(policy, SETTINGS["new"])
problems = [Problem(str(i), text) for i, text in enumerate(SETTINGS["texts"])]
step = 0
say(ready=1)
while True:
    wait()
    clock = Clock()
    groups = engine.rollout(problems, SETTINGS["group"], sampling, step)
    sampled = Clock()
    rewards = [[float(c.tokens[0] % 7) for c in group.completions] for group in groups]

    advantages = [torch.tensor(r).sub(sum(r) / len(r)).numpy() for r in rewards]
    learner.update(pack(to_samples(groups, advantages, False), SETTINGS["batch_tokens"]), loss)
    engine.load(learner.weights())
    step += 1
    tokens = sum(len(c.tokens) for g in groups for c in g.completions)
    clock.say(rollout=sampled.wall - clock.wall, tokens=tokens)
