"""A step of TRL's GRPOTrainer a turn: the quickstart's base, problems, rewards, group, clipping and schedule."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from judging import accuracy, tasks, tokenizer, zero
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import SETTINGS, Clock, say, wait

from limbeck.model import weights
from limbeck.types import Completion, Group

torch.set_num_threads(SETTINGS["threads"])
policy, optimizer = zero.policy, zero.optimizer
theirs = AutoTokenizer.from_pretrained(SETTINGS["model"])
model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32)
problems = {tokenizer.render([{"role": "user", "content": p.prompt}]): p for p in tasks.problems("clock")}
drawn = [tokenizer.render([{"role": "user", "content": p.prompt}]) for step in range(60)
         for p in tasks.draw(policy.prompts_per_step, (SETTINGS["seed"], step))]  # fmt: skip


def reward(prompts, completion_ids, **_):
    scores = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        stopped = ids[-1] == tokenizer.end_id
        completion = Completion(torch.tensor(ids).numpy(), None, tokenizer.decode(ids), stopped, 0, None, None)
        scores.append(tasks.score(Group(problems[prompt], None, (completion,))).rewards[0])
    return scores


class Turns(TrainerCallback):
    """Two optimiser steps, on the two halves of one generation, are one turn."""

    clock: Clock | None = None
    steps = 0

    def on_step_begin(self, *_, **__):
        if self.steps % policy.updates_per_rollout == 0:
            if self.clock is None:
                say(ready=1)
            else:
                wall, due = self.clock.elapsed(), self.steps // policy.updates_per_rollout % SETTINGS["every"] == 0
                self.clock.say(step=wall, accuracy=self.accuracy() if due else -1)
            wait()
            self.clock = Clock()
        self.steps += 1

    def accuracy(self) -> float:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return accuracy(weights.load(Path(folder)))


rows = policy.prompts_per_step * policy.group_size // policy.updates_per_rollout
GRPOTrainer(
    model=model,
    reward_funcs=reward,
    processing_class=theirs,
    train_dataset=Dataset.from_dict({"prompt": drawn}),
    callbacks=[Turns()],
    args=GRPOConfig(
        output_dir="/tmp/limbeck-bench-trl", per_device_train_batch_size=rows, steps_per_generation=policy.updates_per_rollout,
        num_generations=policy.group_size, max_completion_length=zero.sampling.max_new_tokens, beta=0.0, temperature=1.0,
        epsilon=policy.clip_low, epsilon_high=policy.clip_high, loss_type="dapo", scale_rewards="group",
        learning_rate=optimizer.learning_rate, adam_beta1=optimizer.betas[0], adam_beta2=optimizer.betas[1], weight_decay=0.0,
        warmup_steps=optimizer.warmup_steps, lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": optimizer.final_ratio * optimizer.learning_rate, "power": 1.0},
        max_steps=zero.steps * policy.updates_per_rollout, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        logging_steps=10**9, save_strategy="no", report_to="none", shuffle_dataset=False, disable_tqdm=True, top_k=0,
    ),
).train()  # fmt: skip
