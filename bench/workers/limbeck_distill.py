"""One GKD step a turn: write or take rows, let the teacher read, learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from turns import SETTINGS, turns

from limbeck.config.parts import Optimizer
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.text.tokenizer import Tokenizer
from limbeck.train.distill import Assigned, DistillBatch, Teacher, attach_teachers
from limbeck.train.learner import Learner
from limbeck.train.losses import Distillation
from limbeck.train.scorer import Scorer
from limbeck.types import Problem, Sample

torch.set_num_threads(SETTINGS["threads"])
tokenizer = Tokenizer.from_directory(Path(SETTINGS["model"]))
decoder = weights.load(Path(SETTINGS["model"]))
teachers = {"big": Teacher(Scorer(weights.load(Path(SETTINGS["teacher"]))))}
learner = Learner(decoder, Optimizer(learning_rate=1e-6), 1000)
loss = Distillation("jsd", SETTINGS["beta"])
sampling = SamplingParams(max_new_tokens=SETTINGS["new"])
tokenizer.end_id = decoder.config.vocab_size  # never said
engine, count = Engine(decoder, tokenizer), SETTINGS["prompts"]
problems = [Problem(str(i), text) for i, text in enumerate(SETTINGS["texts"])]


def written(batch: list[Problem], step: int) -> list[Sample]:
    """Samples that the student generates for a batch."""
    groups = engine.rollout(batch, 1, sampling, step)
    return [
        Sample(np.concatenate([g.prompt_tokens, g.completions[0].tokens]), len(g.prompt_tokens))
        for g in groups
    ]


def given(batch: list[Problem]) -> list[Sample]:
    """Samples of the given responses to a batch."""
    pairs = [(tokenizer.prompt(p.prompt), tokenizer.encode(SETTINGS["responses"][int(p.id)])) for p in batch]
    return [Sample(np.concatenate([prompt, response]), len(prompt)) for prompt, response in pairs]


for step, clock in enumerate(turns()):
    first = step * count % len(problems)
    batch = problems[first : first + count]
    samples = given(batch) if SETTINGS["rows"] else written(batch, step)
    assigned = DistillBatch([Assigned("big", sample, "") for sample in samples])
    batches, _ = attach_teachers(assigned, teachers, SETTINGS["batch_tokens"])
    said = learner.update(batches, loss)
    engine.load_weights(learner.weights())
    clock.say(tokens=sum(len(s.tokens) - s.start for s in samples), loss=said["loss"])
