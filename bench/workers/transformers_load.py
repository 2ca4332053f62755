"""The same by transformers."""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoModelForCausalLM
from turns import SETTINGS, Clock, turns

torch.set_num_threads(SETTINGS["threads"])

for clock in turns():
    model = AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32)
    sum(
        float(parameter.detach().sum()) for parameter in model.parameters()
    )  # what is only mapped is read here
    loaded = clock.elapsed()
    with tempfile.TemporaryDirectory() as out:
        saving = Clock()
        model.save_pretrained(out)
        saved = saving.elapsed()
    clock.say(load=loaded, save=saved)
