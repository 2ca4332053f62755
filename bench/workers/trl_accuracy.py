"""One step of TRL's GRPOTrainer a turn, with the quickstart's base, problems, rewards and settings."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from judging import accuracy, tasks, tokenizer, zero
from trl import GRPOConfig, GRPOTrainer
from trl_turns import QUIET, Turns, load
from trl_turns import tokenizer as theirs
from turns import SETTINGS, Clock, say

from limbeck.model import weights
from limbeck.types import Completion, Group

policy, optimizer, model = zero.policy, zero.optimizer, load()
steps: list[float] = []
problems = {tokenizer.render([{"role": "user", "content": p.prompt}]): p for p in tasks.problems("clock")}
drawn = [
    tokenizer.render([{"role": "user", "content": p.prompt}])
    for step in range(60)
    for p in tasks.draw(policy.prompts_per_step, (SETTINGS["seed"], step))
]


def reward(prompts, completion_ids, **_):
    """The reward of each completion, as Limbeck's tasks score it."""
    scores = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        stopped = ids[-1] == tokenizer.end_id
        completion = Completion(
            torch.tensor(ids).numpy(), None, tokenizer.decode(ids), stopped, 0, None, None
        )
        scores.append(tasks.score(Group(problems[prompt], None, (completion,))).rewards[0])
    return scores


def tell(clock: Clock) -> None:
    """Report one step, with the held-out accuracy every few steps."""
    steps.append(clock.elapsed())
    say(step=steps[-1], accuracy=measured() if len(steps) % SETTINGS["every"] == 0 else -1)


def measured() -> float:
    """Held-out accuracy of the model at present."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return accuracy(weights.load(Path(folder)))


rows = policy.prompts_per_step * policy.group_size // policy.updates_per_rollout
GRPOTrainer(
    model=model,
    reward_funcs=reward,
    processing_class=theirs,
    train_dataset=Dataset.from_dict({"prompt": drawn}),
    callbacks=[Turns(tell, policy.updates_per_rollout)],  # both halves of one generation are a turn
    args=GRPOConfig(
        per_device_train_batch_size=rows,
        steps_per_generation=policy.updates_per_rollout,
        num_generations=policy.group_size,
        max_completion_length=zero.sampling.max_new_tokens,
        beta=0.0,
        temperature=1.0,
        epsilon=policy.clip_low,
        epsilon_high=policy.clip_high,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        weight_decay=0.0,
        warmup_steps=optimizer.warmup_steps,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": optimizer.final_ratio * optimizer.learning_rate, "power": 1.0},
        max_steps=zero.steps * policy.updates_per_rollout,
        shuffle_dataset=False,
        top_k=0,
        **QUIET,
    ),
).train()
