"""The same rollouts by `generate` of transformers, every prompt repeated for its group."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import SETTINGS, Clock, tell, turns

torch.set_num_threads(SETTINGS["threads"])
tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"])
model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32).eval()
texts = [text for text in SETTINGS["texts"] for _ in range(SETTINGS["group"])]
asked = tokenizer(texts, return_tensors="pt", add_special_tokens=False)


def rollout(length: int) -> float:
    """Seconds of a rollout with responses of `length` tokens."""
    clock = Clock()
    with torch.no_grad():
        model.generate(
            **asked,
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=tokenizer.pad_token_id,
            disable_compile=True,
        )
    return clock.elapsed()


for _ in turns():
    tell(torch, rollout, len(texts))
