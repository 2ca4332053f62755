"""Serving on a device, on `plain` operations: the CPU's answers in any company, no block lost, no wait."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import alone, asks, carry
from test_device_batch import FAMILIES, NoWait
from test_engine import PROMPTS

from limbeck.engine import scheduler as scheduling
from limbeck.engine.device_scheduler import DeviceScheduler
from limbeck.engine.device_serving import DeviceServingBatch
from limbeck.engine.prefix_pool import PrefixPool
from limbeck.engine.request import Request
from limbeck.engine.scheduler import Scheduler
from limbeck.model.ops import PlainOps, use
from limbeck.model.ops.table import BLOCK
from limbeck.types import LimbeckError

BLOCKS = 64  # of a pool


def device_scheduler(model, tokenizer, rows=6, blocks=BLOCKS, **options) -> DeviceScheduler:
    return DeviceScheduler(use(copy.deepcopy(model), PlainOps()), tokenizer, rows, 256, blocks, **options)


def tokens_of(answers) -> list[list[list[int]]]:
    return [[choice.tokens for choice in answer.choices] for answer in answers]


def is_empty(scheduler: DeviceScheduler) -> bool:
    pool = scheduler.serving_batch.pool
    return not scheduler.busy and pool.free == pool.count and not pool.readers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cpu_s_answers_whoever_else_is_served(decoder, tokenizer, family, monkeypatch):
    """Rows join at all ages, sample differently, have penalties, are left by some; prompts are run by
    threes."""
    monkeypatch.setattr(scheduling, "MIN_CHUNK", 3)
    monkeypatch.setattr(scheduling, "MAX_CHUNK", 3)
    model = decoder(torch.float64, **FAMILIES[family])
    scheduler = device_scheduler(model, tokenizer, rows=5)
    requests = asks(tokenizer)
    answers = []
    with torch.inference_mode():
        for request in [*requests, *requests[::-1]]:
            answers.append(scheduler.submit(request))
            scheduler.round()
            lost = scheduler.submit(Request(request.prompt, seed=99, max_new_tokens=9))
            scheduler.round()
            scheduler.cancel(lost)
    carry(scheduler)
    wanted = [[alone(model, tokenizer, a.request, s) for s in range(a.request.copies)] for a in answers]
    assert tokens_of(answers) == wanted
    for answer in answers:
        for choice in answer.choices:
            assert choice.finish == ("stop" if choice.tokens[-1] == tokenizer.end_id else "length")
    assert is_empty(scheduler)
