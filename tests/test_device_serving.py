"""Serving on a device, on `plain` operations: the CPU's answers in any company, no block lost, no wait."""

from __future__ import annotations

import copy
import dataclasses
import threading

import numpy as np
import pytest
import torch
from fake_device import NAME, fake_device
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import alone, asks, carry, draws
from test_device_batch import FAMILIES, NoWait
from test_devices import FULL
from test_engine import PROMPTS, naive

from limbeck.engine import scheduler as scheduling
from limbeck.engine.device_scheduler import DeviceScheduler
from limbeck.engine.device_serving import DeviceServingBatch
from limbeck.engine.loop import EngineThread
from limbeck.engine.prefix_pool import PrefixPool
from limbeck.engine.request import DeviceFull, Request
from limbeck.engine.sampling import SamplingParams
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


def raises(error: Exception):
    """A function that raises an error."""

    def fail(*arguments):
        raise error

    return fail


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


def test_the_cpu_s_answers_in_float32_alone_and_in_company(decoder, tokenizer):
    """The batch of the CPU with its compiled kernels; log-probabilities and likeliest tokens as well."""
    model = decoder(layers=3)
    requests = [dataclasses.replace(request, top=3) for request in asks(tokenizer)]
    host = Scheduler(model, tokenizer, rows=16)
    wanted = [host.submit(request) for request in requests]
    carry(host)
    company = device_scheduler(model, tokenizer, rows=16)
    together = [company.submit(request) for request in requests]
    carry(company)
    single = device_scheduler(model, tokenizer, rows=2)
    for request, one, two in zip(requests, wanted, together, strict=True):
        three = single.submit(request)
        carry(single)
        for a, b, c in zip(one.choices, two.choices, three.choices, strict=True):
            assert a.tokens == b.tokens == c.tokens
            np.testing.assert_allclose(b.logprobs, a.logprobs, atol=1e-4)
            np.testing.assert_allclose(c.logprobs, a.logprobs, atol=1e-4)
            assert [[token for token, _ in top] for top in b.tops] == [[t for t, _ in top] for top in a.tops]
            assert all(len(top) == 3 for top in b.tops)


def test_prompts_that_begin_alike_share_blocks(decoder, tokenizer):
    """Turns of a chat: each prompt is the last one with its answer and a question. Nothing else changes."""
    model = decoder(torch.float64, max_positions=512)
    scheduler = device_scheduler(model, tokenizer, rows=3, blocks=24)
    long = tokenizer.prompt(" ".join(["say", *"123456" * 12, "?"]))
    prompt = long
    for turn in range(4):
        request = Request(prompt, 0.7, max_new_tokens=30, seed=turn, copies=1 + turn % 2, ignore_eos=False)
        answer = scheduler.submit(request)
        twin = scheduler.submit(request)  # at the same time: it finds what was there before both
        carry(scheduler)
        for copies in range(request.copies):
            said = answer.choices[copies].tokens
            assert said == alone(model, tokenizer, request, copies) == twin.choices[copies].tokens
        known = len(prompt) - 1 if turn else 0
        assert answer.cached <= known and (answer.cached >= known - 64 - 30 if turn else not answer.cached)
        assert answer.cached % BLOCK == 0
        prompt = np.concatenate([prompt, answer.choices[0].tokens, long[1:40]])
        assert is_empty(scheduler)
    echoed = scheduler.submit(Request(long, max_new_tokens=0, top=1, echo=True))
    carry(scheduler)
    assert echoed.cached == 0 and len(echoed.prompt_logprobs) == len(long) - 1 and is_empty(scheduler)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 5)), max_size=40))
def test_a_pool_knows_what_its_blocks_hold(actions):
    """Against the naive account of what was written to each block since it was taken."""
    pool = PrefixPool(3, 12)
    texts = [np.arange(BLOCK * 4 + i) % (BLOCK * (1 + i)) for i in range(4)]
    written: dict[int, bytes] = {}
    rows: list[list[int]] = []
    for arrives, which, length in actions:
        tokens = texts[which][: 1 + length * BLOCK]
        if not arrives:
            if rows:
                pool.release(rows.pop(which % len(rows)))
            continue
        known = pool.find(tokens)
        assert [written[block] for block in known] == [
            tokens[: (i + 1) * BLOCK].tobytes() for i in range(len(known))
        ]
        needed = -(-len(tokens) // BLOCK) - len(known)
        if needed > pool.free - pool.unread(known):
            continue
        pool.share(known)
        blocks = known + pool.take(needed)
        for i, block in enumerate(blocks[len(known) :], len(known)):
            written[block] = tokens[: (i + 1) * BLOCK].tobytes()
        pool.remember(tokens, blocks)
        rows.append(blocks)
        assert pool.free == 12 - len(set().union(*rows))
    for blocks in rows:
        pool.release(blocks)
    assert pool.free == 12 and not pool.readers


def test_no_block_is_lost_in_200_arrivals_and_departures(decoder, tokenizer):
    random = np.random.default_rng(0)
    model = decoder()
    scheduler = device_scheduler(model, tokenizer, rows=8, blocks=14)
    live: list = []
    with torch.inference_mode():
        for seed in range(200):
            request = Request(
                tokenizer.prompt(PROMPTS[seed % len(PROMPTS)]),
                top_p=float(random.choice([0.8, 1.0])),
                max_new_tokens=int(random.integers(0, 70)),
                copies=int(random.integers(1, 4)),
                seed=seed,
                presence_penalty=float(random.choice([0.0, 1.0])),
                ignore_eos=bool(random.random() < 0.5),
            )
            live.append(scheduler.submit(request))
            for _ in range(random.integers(0, 4)):
                scheduler.round()
            gone = live.pop(int(random.integers(len(live))))
            if random.random() < 0.5:
                scheduler.cancel(gone)
            elif gone.choices[0].tokens:
                scheduler.enough(gone.choices[0])
            held = {block for row in scheduler.serving_batch.rows for block in row.blocks}
            held |= {b for r in scheduler.prefill_queue.requests for blocks in r.past.blocks for b in blocks}
            assert set(scheduler.serving_batch.pool.readers) == held
    carry(scheduler)
    assert is_empty(scheduler) and scheduler.failures == 0
    assert all(answer.done for answer in live)


def test_who_leaves_is_gone_before_the_next_step_and_who_waits_takes_the_blocks(decoder, tokenizer):
    scheduler = device_scheduler(decoder(max_positions=2048), tokenizer, rows=8, blocks=20)
    prompt = tokenizer.prompt(PROMPTS[0])
    first, second = (
        scheduler.submit(Request(prompt, max_new_tokens=1000, seed=i, ignore_eos=True)) for i in range(2)
    )
    with torch.inference_mode():
        for _ in range(4):
            scheduler.round()
        assert (scheduler.busy, len(scheduler.line)) == (1, 1)  # the pool has room for one
        scheduler.cancel(first)
        scheduler.round()
        assert (scheduler.busy, len(scheduler.line)) == (1, 0)
        scheduler.enough(second.choices[0])
        scheduler.round()
    assert first.done and second.done and is_empty(scheduler)


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thought_is_closed_at_its_budget_in_time(decoder, tokenizer, budget):
    """At the same token as on the CPU, though tokens are read one step late."""
    model = decoder(torch.float64)
    with torch.no_grad():
        model.head.weight[[tokenizer.encode("</think>")[0], tokenizer.end_id]] *= 0
    prompt = np.append(tokenizer.prompt(PROMPTS[0]), tokenizer.encode("<think>"))
    request = Request(prompt, max_new_tokens=40, seed=1, thought_budget=budget, opened=True)
    free = Request(tokenizer.prompt(PROMPTS[1]), 2.0, max_new_tokens=40, seed=2, thought_budget=budget)
    found = []
    for scheduler in (Scheduler(model, tokenizer), device_scheduler(model, tokenizer)):
        answers = [scheduler.submit(request), scheduler.submit(free)]
        carry(scheduler)
        found.append(tokens_of(answers))
    assert found[0] == found[1] and found[1][0][0][budget] == tokenizer.encode("</think>")[0]


def test_tokens_are_read_while_the_next_step_runs(decoder, tokenizer, monkeypatch):
    """The host waits for a step only when the next one was started."""
    events = []

    class Watched(PlainOps):
        def fetch(self, x):
            value = super().fetch(x)
            return lambda: events.append("read") or value()

    model = use(decoder(), Watched())
    scheduler = DeviceScheduler(model, tokenizer, 4, 9, BLOCKS)
    step = DeviceServingBatch._step
    monkeypatch.setattr(
        DeviceServingBatch, "_step", lambda self, *kind: events.append("start") or step(self, *kind)
    )
    answer = scheduler.submit(Request(tokenizer.prompt(PROMPTS[0]), max_new_tokens=5, ignore_eos=True))
    carry(scheduler)
    assert len(answer.choices[0].tokens) == 5
    assert events == ["start", *["start", "read"] * 4, "read"]


def test_a_step_waits_for_nothing_and_its_tensors_stay(decoder, tokenizer):
    scheduler = device_scheduler(decoder(), tokenizer, rows=4)
    batch = scheduler.serving_batch
    requests = asks(tokenizer)[:3]

    def places() -> list[int]:
        values = [getattr(batch.state, name) for name in batch.state.__dataclass_fields__]
        tensors = [t for v in values for t in ([v] if isinstance(v, torch.Tensor) else v)]
        return [tensor.data_ptr() for tensor in (*tensors, batch.cache.keys)]

    before = places()
    for request in requests:
        scheduler.submit(dataclasses.replace(request, copies=1))
    with torch.inference_mode():
        scheduler.round()
        with NoWait():
            batch._step(4, 2, True, True, True)
            batch._step(2, 1, False, False, False)
    carry(scheduler)
    assert places() == before


def test_a_full_memory_ends_the_newest_request_alone(decoder, tokenizer, monkeypatch):
    model = decoder(torch.float64)
    scheduler = device_scheduler(model, tokenizer, rows=8)
    told = []
    scheduler.tell = told.extend
    batch = scheduler.serving_batch
    fail = raises(torch.OutOfMemoryError(FULL))
    request = Request(tokenizer.prompt(PROMPTS[0]), max_new_tokens=30, ignore_eos=True)
    first = scheduler.submit(request)
    with torch.inference_mode():
        scheduler.try_round()
        with monkeypatch.context() as patch:
            patch.setattr(batch, "capture", fail)  # of a step of more rows
            second = scheduler.submit(dataclasses.replace(request, seed=2, copies=2))
            scheduler.try_round()
        with monkeypatch.context() as patch:
            patch.setattr(batch, "prefill", fail)
            third = scheduler.submit(dataclasses.replace(request, seed=3))
            scheduler.try_round()
    carry(scheduler)
    for answer in (second, third):
        assert str(answer.error) == (
            "the card's memory is full: 2.50 GiB more were asked for, of 23.99 GiB only 1.10 GiB are free; "
            "ask for fewer tokens, or again when other requests have ended"
        )
        assert answer in told and answer.done and isinstance(answer.error, DeviceFull)
    assert first.error is None
    assert (
        first.choices[0].tokens
        == naive(model, -1, request.prompt, draws(request), SamplingParams(1.0, 1.0, 30))[0]
    )
    assert is_empty(scheduler) and scheduler.failures == 2


def test_a_step_that_fails_ends_all_and_the_next_are_served(decoder, tokenizer, monkeypatch):
    model = decoder(torch.float64)
    scheduler = device_scheduler(model, tokenizer)
    request = Request(tokenizer.prompt(PROMPTS[0]), max_new_tokens=9)
    for error in (torch.OutOfMemoryError(FULL), ZeroDivisionError()):
        answers = [scheduler.submit(request) for _ in range(2)]
        with torch.inference_mode(), monkeypatch.context() as patch:
            patch.setattr(DeviceServingBatch, "_advance", raises(error))
            scheduler.try_round()
        expected = DeviceFull if isinstance(error, torch.OutOfMemoryError) else ZeroDivisionError
        assert all(answer.done and isinstance(answer.error, expected) for answer in answers)
        after = scheduler.submit(request)
        carry(scheduler)
        assert tokens_of([after]) == [[alone(model, tokenizer, request)]] and is_empty(scheduler)


def test_a_device_that_failed_ends_the_thread_and_tells(decoder, tokenizer, monkeypatch):
    scheduler = device_scheduler(decoder(), tokenizer)
    thread = EngineThread([scheduler])
    failed = threading.Event()
    thread.on_failure = failed.set
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for")
    monkeypatch.setattr(DeviceServingBatch, "_advance", raises(error))
    thread.start()
    answer = scheduler.submit(Request(tokenizer.prompt(PROMPTS[0]), max_new_tokens=9))
    assert failed.wait(60)
    assert thread.failure is error and answer.error is error and answer.done
    with pytest.raises(LimbeckError, match="closing"):
        scheduler.submit(Request(tokenizer.prompt(PROMPTS[0]), max_new_tokens=9))
    thread.close()


def test_what_can_never_fit_is_refused_at_once(decoder, tokenizer):
    scheduler = device_scheduler(decoder(max_positions=4096), tokenizer, blocks=10)
    prompt = tokenizer.prompt(PROMPTS[0])
    with pytest.raises(
        LimbeckError, match=r"max_tokens: a prompt of \d+ tokens and n = 3 answers of 300 nee"
    ):
        scheduler.submit(Request(prompt, max_new_tokens=300, copies=3))
    answer = scheduler.submit(Request(prompt, max_new_tokens=300, copies=1, ignore_eos=True))
    carry(scheduler)
    assert len(answer.choices[0].tokens) == 300 and is_empty(scheduler)


def test_no_step_mixes_the_tensors_of_two_devices(decoder, tokenizer):
    """On a device whose tensors are not the CPU's: everything that is sent and fetched is."""
    wanted = device_scheduler(decoder(), tokenizer)
    requests = [
        dataclasses.replace(request, top=2, thought_budget=3, opened=True) for request in asks(tokenizer)
    ]
    requests.append(Request(requests[0].prompt, max_new_tokens=0, top=1, echo=True))
    answers = [wanted.submit(request) for request in requests]
    carry(wanted)
    with fake_device():
        model = use(decoder().to(NAME), PlainOps())
        scheduler = DeviceScheduler(model, tokenizer, 6, 256, BLOCKS)
        found = [scheduler.submit(request) for request in requests]
        with torch.no_grad():
            while scheduler.line or scheduler.busy:
                scheduler.round()
    assert tokens_of(found) == tokens_of(answers) and is_empty(scheduler)
    for one, two in zip(found, answers, strict=True):
        np.testing.assert_allclose(one.choices[0].logprobs, two.choices[0].logprobs, atol=1e-4)
        np.testing.assert_allclose(one.prompt_logprobs, two.prompt_logprobs, atol=1e-4)
