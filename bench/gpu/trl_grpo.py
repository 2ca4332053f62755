"""GRPO steps of TRL's trainer, told in lines of JSON. `peers.py` starts it, and ends it.

python -m bench.gpu.trl_grpo '{"model": "folder", "texts": [...], "group": 8, "new": 128, "steps": 3, ...}'
"""

from __future__ import annotations

import json
import sys
import time

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

SETTINGS = json.loads(sys.argv[1])
lengths: list[int] = []


class Times(TrainerCallback):
    """Tells the seconds of each step: its rollout, its rewards and its update."""

    def on_step_begin(self, *_, **__):
        """Take the time."""
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__):
        """Tell how long the step took, and how many tokens it sampled."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begin
        print(json.dumps({"trl_seconds": seconds, "tokens": lengths[-1] if lengths else 0}), flush=True)


def reward(completions, completion_ids, **_):
    """A reward that costs nothing: the first token modulo 7."""
    lengths.append(sum(map(len, completion_ids)))
    return [float(ids[0] % 7) for ids in completion_ids]


def main() -> None:
    """Train for a few steps, with weights in 16 bits on a card, which TRL is fastest with."""
    cpu = SETTINGS["cpu"]
    print(json.dumps({"trl": trl.__version__}), flush=True)
    dtype = torch.float32 if cpu else torch.bfloat16
    rows = len(SETTINGS["texts"]) * SETTINGS["group"]
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=dtype),
        reward_funcs=reward,
        processing_class=AutoTokenizer.from_pretrained(SETTINGS["model"]),
        train_dataset=Dataset.from_dict({"prompt": SETTINGS["texts"] * SETTINGS["steps"]}),
        callbacks=[Times()],
        args=trl.GRPOConfig(
            output_dir=SETTINGS["folder"],
            per_device_train_batch_size=rows,
            num_generations=SETTINGS["group"],
            max_completion_length=SETTINGS["new"],
            generation_kwargs={"min_new_tokens": SETTINGS["new"]},
            max_steps=SETTINGS["steps"],
            learning_rate=1e-6,
            beta=0.0,
            temperature=1.0,
            shuffle_dataset=False,
            use_cpu=cpu,
            bf16=not cpu,
            gradient_checkpointing=False,
            logging_steps=10**9,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
