"""One step of TRL's GKDTrainer a turn: the same student, teacher, prompts and lengths."""

from __future__ import annotations

from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl_turns import ENDLESS, QUIET, Turns, counted, load, tokenizer
from turns import SETTINGS

Counted, seen = counted(GKDTrainer, "labels", -100)


def row(asked: str, said: str) -> dict:
    """As the trainer's collator takes rows that have ids already."""
    prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, said))
    return {
        "prompt": asked,
        "input_ids": prompt + response,
        "completion_mask": [0] * len(prompt) + [1] * len(response),
    }


rows = [row(asked, said) for asked, said in zip(SETTINGS["texts"], SETTINGS["responses"], strict=True)]
trainer = Counted(
    model=load(),
    teacher_model=load("teacher"),
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(rows * 20),
    callbacks=[Turns(lambda clock: clock.say(tokens=seen[-1][0], loss=seen[-1][1]))],
    args=GKDConfig(
        per_device_train_batch_size=SETTINGS["prompts"],
        lmbda=0.0 if SETTINGS["rows"] else 1.0,
        beta=SETTINGS["beta"],
        temperature=1.0,
        max_new_tokens=SETTINGS["new"],
        max_length=1024,
        **ENDLESS,
        **QUIET,
    ),
)
trainer.generation_config.min_new_tokens = SETTINGS["new"]
trainer.train()
