"""Rollouts of B rows, prompts prefilled once a group; timed for one new token and for all of them."""

from __future__ import annotations

from pathlib import Path

import torch
from turns import SETTINGS, Clock, tell, turns

from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.text.tokenizer import Tokenizer
from limbeck.types import Problem

torch.set_num_threads(SETTINGS["threads"])
tokenizer = Tokenizer.from_directory(Path(SETTINGS["model"]))
decoder = weights.load(Path(SETTINGS["model"]))
tokenizer.end_id = decoder.config.vocab_size  # never said
engine = Engine(decoder, tokenizer)
problems = [Problem(str(i), text) for i, text in enumerate(SETTINGS["texts"])]


def rollout(length: int) -> float:
    """Seconds of a rollout with responses of `length` tokens."""
    clock = Clock()
    engine.rollout(problems, SETTINGS["group"], SamplingParams(max_new_tokens=length), 0)
    return clock.elapsed()


for _ in turns():
    tell(torch, rollout, len(problems) * SETTINGS["group"])
