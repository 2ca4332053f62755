"""One step of TRL's DPOTrainer a turn over the same pairs, the reference precomputed."""

from __future__ import annotations

from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl_turns import ENDLESS, QUIET, Turns, counted, load, tokenizer
from turns import SETTINGS

Counted, seen = counted(DPOTrainer, "attention_mask", 0)


columns = {"prompt": SETTINGS["texts"], "chosen": SETTINGS["chosen"], "rejected": SETTINGS["rejected"]}
spaced = {
    key: values if key == "prompt" else [f" {text}" for text in values] for key, values in columns.items()
}
Counted(
    model=load(),
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict(spaced),
    callbacks=[Turns(lambda clock: clock.say(tokens=seen[-1][0], loss=seen[-1][1]))],
    args=DPOConfig(
        per_device_train_batch_size=SETTINGS["pairs"],
        max_length=None,
        beta=0.1,
        precompute_ref_log_probs=True,
        **ENDLESS,
        **QUIET,
    ),
).train()
