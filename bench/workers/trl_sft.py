"""One step of TRL's SFTTrainer a turn over the same documents, packed or not."""

from __future__ import annotations

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl_turns import ENDLESS, QUIET, Turns, counted, load, tokenizer
from turns import SETTINGS, Clock

Counted, seen = counted(SFTTrainer, "labels", -100)


def tell(clock: Clock) -> None:
    """Report the tokens of one step and their rate."""
    clock.say(tokens=seen[-1][0], tokens_per_second=seen[-1][0] / clock.elapsed())


packed = SETTINGS["packed"]
rows = (
    max(1, round(SETTINGS["batch"] * SETTINGS["mean"] / SETTINGS["longest"])) if packed else SETTINGS["batch"]
)
Counted(
    model=load(),
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"text": SETTINGS["texts"] * 20}),
    callbacks=[Turns(tell)],
    args=SFTConfig(
        per_device_train_batch_size=rows,
        max_length=SETTINGS["longest"],
        packing=packed,
        eos_token=tokenizer.eos_token,
        **ENDLESS,
        **QUIET,
    ),
).train()
