"""One step of TRL's SFTTrainer a turn over the same documents, packed or not."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from turns import SETTINGS, Clock, say, wait

torch.set_num_threads(SETTINGS["threads"])
tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"])
model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32)
learned: list[int] = []


class Counted(SFTTrainer):
    def compute_loss(self, model, inputs, *args, **more):
        learned.append(int((inputs["labels"] != -100).sum()))
        return super().compute_loss(model, inputs, *args, **more)


class Turns(TrainerCallback):
    clock: Clock | None = None

    def on_step_begin(self, *_, **__):
        if self.clock is None:
            say(ready=1)
        else:
            self.clock.say(tokens=learned[-1], tokens_per_second=learned[-1] / self.clock.elapsed())
        wait()
        self.clock = Clock()


packed = SETTINGS["packed"]
rows = max(1, round(SETTINGS["batch"] * SETTINGS["mean"] / SETTINGS["longest"])) if packed else SETTINGS["batch"]
Counted(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"text": SETTINGS["texts"] * 20}),
    callbacks=[Turns()],
    args=SFTConfig(
        output_dir="/tmp/limbeck-bench-trl", per_device_train_batch_size=rows, max_length=SETTINGS["longest"], packing=packed,
        learning_rate=1e-6, max_steps=1000, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, logging_steps=10**9,
        save_strategy="no", report_to="none", disable_tqdm=True, eos_token=tokenizer.eos_token,
    ),
).train()  # fmt: skip
