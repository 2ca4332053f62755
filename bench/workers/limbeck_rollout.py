"""Rollouts of B rows, prompts prefilled once a group; timed for one new token and for all of them."""

from __future__ import annotations

from pathlib import Path

import torch
from turns import SETTINGS, Clock, turns

from limbeck.engine.engine import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.tokenizer import Tokenizer
from limbeck.types import Problem

torch.set_num_threads(SETTINGS["threads"])
tokenizer = Tokenizer.from_directory(Path(SETTINGS["model"]))
decoder = weights.load(Path(SETTINGS["model"]))
tokenizer.end_id = decoder.config.vocab_size  # never said
engine = Engine(decoder, tokenizer)
problems = [Problem(str(i), text) for i, text in enumerate(SETTINGS["texts"])]

def products(rows: int) -> float:
    """GFLOP/s of this model's own matrix products at so many rows, one after the other, as a step meets them."""
    matrices = [p for n, p in decoder.named_parameters() if p.ndim == 2 and n.startswith("blocks")] + [decoder.head.weight]
    inputs = {p.shape[1]: torch.randn(rows, p.shape[1]) for p in matrices}
    times = []
    for _ in range(8):
        clock = Clock()
        with torch.no_grad():
            for weight in matrices:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        times.append(clock.elapsed())
    return 2 * rows * sum(p.numel() for p in matrices) / min(times) / 1e9


reached = products(SETTINGS["group"] * len(problems))
for clock in turns():
    for length in (1, SETTINGS["new"]):
        clock = Clock()
        groups = engine.rollout(problems, SETTINGS["group"], SamplingParams(max_new_tokens=length), 0)
        if length == 1:
            first = Clock().wall - clock.wall
    rows = sum(len(group.completions) for group in groups)
    whole = Clock().wall - clock.wall
    clock.say(first=first, tokens_per_second=rows * SETTINGS["new"] / whole, decode=rows * (SETTINGS["new"] - 1) / (whole - first),
              products_gflops=reached)
