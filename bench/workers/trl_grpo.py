"""One GRPO step of TRL's trainer a turn: the same model, prompts, group and lengths, and a trivial reward."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import SETTINGS, Clock, say, wait

torch.set_num_threads(SETTINGS["threads"])
tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"])
model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32)
model.generation_config.eos_token_id = [tokenizer.eos_token_id, *SETTINGS["stop"]]
lengths: list[int] = []
sampled: list[float] = []


def reward(completions, completion_ids, **_):
    lengths.append(sum(map(len, completion_ids)))
    sampled.append(Clock().wall)
    return [float(ids[0] % 7) for ids in completion_ids]


class Turns(TrainerCallback):
    clock: Clock

    def on_step_begin(self, *_, **__):
        if self.clock is None:
            say(ready=1)
        else:
            self.clock.say(rollout=sampled[-1] - self.clock.wall, tokens=lengths[-1])
        wait()
        self.clock = Clock()


Turns.clock = None
rows = SETTINGS["prompts"] * SETTINGS["group"]
options = {"min_new_tokens": SETTINGS["new"]} if SETTINGS["fixed"] else None
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"prompt": SETTINGS["texts"] * 400}),
    callbacks=[Turns()],
    args=GRPOConfig(
        output_dir="/tmp/limbeck-bench-trl", per_device_train_batch_size=rows, num_generations=SETTINGS["group"],
        max_completion_length=SETTINGS["new"], beta=0.0, temperature=1.0, learning_rate=1e-6, max_steps=1000, use_cpu=True, bf16=False,
        fp16=False, gradient_checkpointing=False, logging_steps=10**9, save_strategy="no", report_to="none", shuffle_dataset=False,
        generation_kwargs=options, disable_tqdm=True,
    ),
)  # fmt: skip
trainer.train()
