"""A step of the quickstart's zero a turn, by the loop of `limbeck run`'s own parts."""

from __future__ import annotations

from pathlib import Path

import torch
from judging import accuracy, sampling, tasks, tokenizer, zero
from turns import SETTINGS, turns

from limbeck.engine.rollout import Engine
from limbeck.model import weights
from limbeck.train.batch import pack, to_samples
from limbeck.train.grpo import group_advantages, minibatches
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient

torch.set_num_threads(SETTINGS["threads"])
policy = zero.policy
decoder = weights.load(Path(SETTINGS["model"]))
learner = Learner(decoder, zero.optimizer, zero.steps * policy.updates_per_rollout)
engine, loss = Engine(decoder, tokenizer), PolicyGradient(policy, sampling.max_new_tokens)

for step, clock in enumerate(turns()):
    problems = tasks.draw(policy.prompts_per_step, (SETTINGS["seed"], step))
    groups = [
        tasks.score(group)
        for group in engine.rollout(problems, policy.group_size, sampling, (SETTINGS["seed"], step))
    ]
    groups = [group for group in groups if len(set(group.rewards)) > 1]
    samples = to_samples(groups, group_advantages(groups, policy.advantage_scale), False)
    for part in minibatches(samples, policy.updates_per_rollout, (SETTINGS["seed"], step)):
        learner.update(pack(part, zero.batch_tokens), loss)
    wall = clock.elapsed()
    clock.say(step=wall, accuracy=accuracy(decoder) if (step + 1) % SETTINGS["every"] == 0 else -1)
