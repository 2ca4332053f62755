"""A checkpoint read and written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from turns import SETTINGS, Clock, turns

from limbeck.model import weights
from limbeck.text.tokenizer import Tokenizer

torch.set_num_threads(SETTINGS["threads"])
folder = Path(SETTINGS["model"])
tokenizer = Tokenizer.from_directory(folder)

for clock in turns():
    decoder = weights.load(folder)
    sum(float(parameter.detach().sum()) for parameter in decoder.parameters())
    loaded = clock.elapsed()
    with tempfile.TemporaryDirectory() as out:
        saving = Clock()
        weights.save(decoder, Path(out), tokenizer)
        saved = saving.elapsed()
    clock.say(load=loaded, save=saved)
