"""One GRPO step of TRL's trainer a turn: the same model, prompts, group and lengths, and a trivial reward."""

from __future__ import annotations

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl_turns import ENDLESS, QUIET, Turns, load, tokenizer
from turns import SETTINGS, Clock

model = load()
model.generation_config.eos_token_id = [tokenizer.eos_token_id, *SETTINGS["stop"]]
lengths: list[int] = []
sampled: list[float] = []


def reward(completions, completion_ids, **_):
    """A reward that costs nothing: the first token modulo 7."""
    lengths.append(sum(map(len, completion_ids)))
    sampled.append(Clock().wall)
    return [float(ids[0] % 7) for ids in completion_ids]


rows = SETTINGS["prompts"] * SETTINGS["group"]
options = {"min_new_tokens": SETTINGS["new"]} if SETTINGS["fixed"] else None
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    processing_class=tokenizer,
    train_dataset=Dataset.from_dict({"prompt": SETTINGS["texts"] * 400}),
    callbacks=[Turns(lambda clock: clock.say(rollout=sampled[-1] - clock.wall, tokens=lengths[-1]))],
    args=GRPOConfig(
        per_device_train_batch_size=rows,
        num_generations=SETTINGS["group"],
        max_completion_length=SETTINGS["new"],
        beta=0.0,
        temperature=1.0,
        shuffle_dataset=False,
        generation_kwargs=options,
        **ENDLESS,
        **QUIET,
    ),
)
trainer.train()
