"""One step of TRL's DPOTrainer a turn over the same pairs, the reference precomputed."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
from turns import SETTINGS, Clock, say, wait

torch.set_num_threads(SETTINGS["threads"])
tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"])
model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32)
seen: list[tuple[int, float]] = []


class Counted(DPOTrainer):
    def compute_loss(self, model, inputs, *args, **more):
        loss = super().compute_loss(model, inputs, *args, **more)
        seen.append((int(inputs["attention_mask"].sum()), float(loss.detach() if torch.is_tensor(loss) else loss[0].detach())))
        return loss


class Turns(TrainerCallback):
    clock: Clock | None = None

    def on_step_begin(self, *_, **__):
        if self.clock is None:
            say(ready=1)
        else:
            tokens, loss = seen[-1]
            self.clock.say(tokens=tokens, loss=loss)
        wait()
        self.clock = Clock()


columns = {"prompt": SETTINGS["texts"], "chosen": SETTINGS["chosen"], "rejected": SETTINGS["rejected"]}
spaced = {key: values if key == "prompt" else [f" {text}" for text in values] for key, values in columns.items()}
Counted(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict(spaced),
    callbacks=[Turns()],
    args=DPOConfig(
        output_dir="/tmp/limbeck-bench-trl", per_device_train_batch_size=SETTINGS["pairs"], max_length=None, beta=0.1,
        precompute_ref_log_probs=True, learning_rate=1e-6, max_steps=1000, use_cpu=True, bf16=False, fp16=False,
        gradient_checkpointing=False, logging_steps=10**9, save_strategy="no", report_to="none", disable_tqdm=True,
    ),
).train()  # fmt: skip
