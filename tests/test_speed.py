"""What guards speed: our path beside our plain path, on the machine at hand. Ratios to peers are benchmarks
(`bench/`)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from limbeck.config.parts import Optimizer
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import kernels
from limbeck.model.kernels.decode_step import DecodeStep
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.types import Problem, Sample

MARGIN = (
    1.25  # where kernels are used they take half of the time: noise on a busy machine does not cross this
)
TURNS = 5


def rollout(model, tokenizer) -> Callable[[], object]:
    engine, problems = (
        Engine(model, tokenizer, 64),
        [Problem(id=str(i), prompt=f"use {i} 1 6 make 4 ?") for i in range(8)],
    )
    return lambda: engine.rollout(problems, 8, SamplingParams(max_new_tokens=48), 0)


def update(model, tokenizer) -> Callable[[], object]:
    draw = np.random.default_rng(0)
    samples = [Sample(draw.integers(0, tokenizer.size, n), start=4) for n in draw.integers(20, 90, 48)]
    learner = Learner(model, Optimizer(learning_rate=1e-9), 1000)
    return lambda: learner.update(pack(samples, 4096), CrossEntropy())


@pytest.mark.skipif(kernels.library() is None, reason=f"no kernels here: {kernels.found()[1]}")
@pytest.mark.parametrize("work", [rollout, update])
def test_our_path_is_never_slower_than_plain_torch(work, decoder, tokenizer, monkeypatch):
    """Processor time of turns that take each other's place; the least of each, which others disturb least."""
    model = decoder(hidden_size=64, heads=4, kv_heads=4, head_dim=16, intermediate_size=176, layers=3)
    turn = work(model, tokenizer)
    spent: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(TURNS + 1):
        for ours, times in spent.items():
            with monkeypatch.context() as patch:
                if not ours:
                    patch.setattr(kernels, "serves", lambda *_: False)
                    patch.setattr(DecodeStep, "fits", staticmethod(lambda model: False))
                    patch.setattr(kernels, "serves_product", lambda *_: False)
                begin = time.process_time()
                turn()
                times.append(time.process_time() - begin)
    assert min(spent[True][1:]) <= MARGIN * min(spent[False][1:])
