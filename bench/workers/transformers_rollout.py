"""The same rollouts by `generate` of transformers, every prompt repeated for its group."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import SETTINGS, Clock, turns

torch.set_num_threads(SETTINGS["threads"])
tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"])
model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32).eval()
texts = [text for text in SETTINGS["texts"] for _ in range(SETTINGS["group"])]
asked = tokenizer(texts, return_tensors="pt", add_special_tokens=False)

for clock in turns():
    for length in (1, SETTINGS["new"]):
        clock = Clock()
        with torch.no_grad():
            model.generate(
                **asked, max_new_tokens=length, min_new_tokens=length, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                pad_token_id=tokenizer.pad_token_id, disable_compile=True,
            )  # fmt: skip
        if length == 1:
            first = Clock().wall - clock.wall
    whole = Clock().wall - clock.wall
    rows = len(texts)
    clock.say(first=first, tokens_per_second=rows * SETTINGS["new"] / whole, decode=rows * (SETTINGS["new"] - 1) / (whole - first))
