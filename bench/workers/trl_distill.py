"""One step of TRL's GKDTrainer a turn: the same student, teacher, prompts and lengths."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer
from turns import SETTINGS, Clock, say, wait

torch.set_num_threads(SETTINGS["threads"])
tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"])
model, teacher = (AutoModelForCausalLM.from_pretrained(SETTINGS[name], dtype=torch.float32) for name in ("model", "teacher"))
seen: list[tuple[int, float]] = []


class Counted(GKDTrainer):
    def compute_loss(self, model, inputs, *args, **more):
        loss = super().compute_loss(model, inputs, *args, **more)
        seen.append((int((inputs["labels"] != -100).sum()), float(loss.detach() if torch.is_tensor(loss) else loss[0].detach())))
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


def row(asked: str, said: str) -> dict:
    """As the trainer's collator takes rows that have ids already."""
    prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, said))
    return {"prompt": asked, "input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)}


rows = [row(asked, said) for asked, said in zip(SETTINGS["texts"], SETTINGS["responses"], strict=True)]
trainer = Counted(
    model=model,
    teacher_model=teacher,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(rows * 20),
    callbacks=[Turns()],
    args=GKDConfig(
        output_dir="/tmp/limbeck-bench-trl", per_device_train_batch_size=SETTINGS["prompts"], lmbda=0.0 if SETTINGS["rows"] else 1.0,
        beta=SETTINGS["beta"], temperature=1.0, max_new_tokens=SETTINGS["new"], max_length=1024, learning_rate=1e-6, max_steps=1000,
        use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, logging_steps=10**9, save_strategy="no", report_to="none",
        disable_tqdm=True,
    ),
)  # fmt: skip
trainer.generation_config.min_new_tokens = SETTINGS["new"]
trainer.train()
