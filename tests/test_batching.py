"""Continuous batching against the loop that knows no batch: whoever else is served, however prompts are cut,
whatever is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_engine import BUDGET, PROMPTS, naive

from limbeck.engine import prefill
from limbeck.engine import scheduler as scheduling
from limbeck.engine.loop import EngineThread
from limbeck.engine.prefix_cache import PrefixCache, common_prefix_length
from limbeck.engine.request import QueueFull, Request
from limbeck.engine.sampling import SamplingParams, nucleus
from limbeck.engine.scheduler import Scheduler
from limbeck.model.config import Experts, Latent
from limbeck.model.kv_cache import Packed
from limbeck.model.prefill_cache import SequenceKV
from limbeck.types import LimbeckError, generator

MODELS = {
    "plain": {},
    "latent": {"latent": Latent(8, 6, 4, 5), "kv_heads": 4, "head_dim": 10},
    "windows": {"windows": (3, 0)},
    "shared keys": {"share_kv": 2},
    "mixture": {"experts": Experts(4, 2, 16)},
}


def draws(request: Request, sample: int = 0) -> np.ndarray:
    return generator(request.seed, "stream", sample).random(request.max_new_tokens)


def alone(model, tokenizer, request: Request, sample: int = 0) -> list[int]:
    sampling = SamplingParams(
        request.temperature,
        request.top_p,
        request.max_new_tokens,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
    )
    return naive(model, tokenizer.end_id, request.prompt, draws(request, sample), sampling)[0]


def asks(tokenizer) -> list[Request]:
    kinds = [
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 0.0},
        {"presence_penalty": 1.2, "top_k": 5},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.7, "min_p": 0.05, "frequency_penalty": -1.0, "repetition_penalty": 0.7},
    ]
    requests = []
    for i, text in enumerate(PROMPTS):
        kind = kinds[i % len(kinds)]
        prompt = tokenizer.prompt(text)
        requests.append(Request(prompt, max_new_tokens=BUDGET - i, copies=1 + i % 2, seed=i, **kind))
    return requests


def carry(scheduler: Scheduler, rounds: int = 1000) -> None:
    """Round after round until nobody is left."""
    with torch.inference_mode():
        while (scheduler.line or scheduler.busy) and rounds:
            scheduler.round()
            rounds -= 1


@pytest.mark.parametrize("kind", MODELS)
def test_answers_are_those_of_the_plain_loop_whoever_else_is_served(decoder, tokenizer, kind, monkeypatch):
    """Rows join at all ages, sample differently, are left by some; prompts are read by threes; texts come
    again."""
    monkeypatch.setattr(scheduling, "MIN_CHUNK", 3)
    monkeypatch.setattr(scheduling, "MAX_CHUNK", 3)
    model, requests = decoder(torch.float64, **MODELS[kind]), asks(tokenizer)
    scheduler = Scheduler(model, tokenizer, rows=5)
    answers = []
    with torch.inference_mode():
        for request in [*requests, *requests[::-1]]:
            answers.append(scheduler.submit(request))
            scheduler.round()
            lost = scheduler.submit(Request(request.prompt, seed=99, max_new_tokens=9))
            scheduler.round()
            scheduler.cancel(lost)
    carry(scheduler)
    for answer in answers:
        found = [choice.tokens for choice in answer.choices]
        assert found == [
            alone(model, tokenizer, answer.request, sample) for sample in range(answer.request.copies)
        ]
        assert [choice.finish for choice in answer.choices] == [
            "stop" if t[-1] == tokenizer.end_id else "length" for t in found
        ]
    assert sum(answer.cached for answer in answers[: len(PROMPTS)]) < sum(
        answer.cached for answer in answers[len(PROMPTS) :]
    )
    assert scheduler.busy == 0


def test_the_kernels_say_the_same(decoder, tokenizer):
    """In float32 rows are moved and lent to one another by another layout."""
    model = decoder(layers=3)
    scheduler = Scheduler(model, tokenizer, rows=6)
    answers = [scheduler.submit(request) for request in asks(tokenizer) * 2]
    carry(scheduler)
    wanted = [[alone(model, tokenizer, a.request, s) for s in range(a.request.copies)] for a in answers]
    agreed = [[c.tokens for c in a.choices] == w for a, w in zip(answers, wanted, strict=True)]
    assert sum(agreed) >= len(agreed) - 1  # a draw may fall on a rounding


def test_a_long_answer_outgrows_what_was_made_for_it(decoder, tokenizer):
    model = decoder(torch.float64, max_positions=512)
    request = Request(tokenizer.prompt(PROMPTS[0]), max_new_tokens=200, seed=4, ignore_eos=True)
    scheduler = Scheduler(model, tokenizer, rows=3)
    answers = [
        scheduler.submit(request),
        scheduler.submit(Request(tokenizer.prompt(PROMPTS[1]), max_new_tokens=5)),
    ]
    carry(scheduler)
    wanted = naive(model, -1, request.prompt, draws(request), SamplingParams(1.0, 1.0, 200))[0]
    assert answers[0].choices[0].tokens == wanted


def test_an_echoed_prompt_tells_what_the_model_thought_of_it(decoder, tokenizer, monkeypatch):
    monkeypatch.setattr(scheduling, "MIN_CHUNK", 4)
    monkeypatch.setattr(scheduling, "MAX_CHUNK", 4)
    model, prompt = decoder(torch.float64), tokenizer.prompt(PROMPTS[5])
    monkeypatch.setattr(prefill, "LOGITS", 2 * model.config.vocab_size)
    scheduler = Scheduler(model, tokenizer)
    for known in range(2):  # the second time the prompt is known, and read again all the same
        answer = scheduler.submit(Request(prompt, 0.0, max_new_tokens=known, top=2, echo=True))
        carry(scheduler)
        with torch.no_grad():
            scores = torch.log_softmax(
                model(torch.tensor(prompt), Packed([len(prompt)])) @ model.head.weight.T, -1
            )
        np.testing.assert_allclose(
            answer.prompt_logprobs, scores[:-1].gather(1, torch.tensor(prompt[1:, None])).flatten(), atol=1e-8
        )
        assert [top[0][0] for top in answer.prompt_tops] == scores[:-1].argmax(-1).tolist()
        assert answer.cached == 0 and answer.done and answer.choices[0].finish == "length"
    assert answer.choices[0].tokens == [int(scores[-1].argmax())]
    assert answer.choices[0].logprobs == [pytest.approx(float(scores[-1].max()))]


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thought_that_has_had_its_budget_is_closed(decoder, tokenizer, budget):
    """Once, whether the prompt opens it or the model would; an answer that never thinks is left alone."""
    model = decoder(torch.float64)
    with torch.no_grad():
        model.head.weight[tokenizer.encode("</think>")[0]] *= 0
        model.head.weight[tokenizer.end_id] *= 0
    close, scheduler = tokenizer.encode("</think>")[0], Scheduler(model, tokenizer)
    prompt = tokenizer.prompt(PROMPTS[0])
    opened = Request(
        np.append(prompt, tokenizer.encode("<think>")),
        max_new_tokens=40,
        seed=1,
        thought_budget=budget,
        opened=True,
    )
    silent = Request(prompt, max_new_tokens=40, seed=1, thought_budget=budget)
    answers = [scheduler.submit(opened), scheduler.submit(silent)]
    carry(scheduler)
    tokens = answers[0].choices[0].tokens
    free = alone(model, tokenizer, Request(opened.prompt, max_new_tokens=40, seed=1))
    assert (
        tokens[: budget + 1] == [*free[:budget], close]
        and close not in tokens[budget + 1 :]
        and len(tokens) == 40
    )
    said = answers[1].choices[0].tokens
    assert said == alone(model, tokenizer, silent) and said[0] not in tokenizer.encode("<think>")


def test_a_model_that_opens_its_thought_itself_is_closed_too(decoder, tokenizer):
    model, (think, close) = decoder(torch.float64), tokenizer.encode("<think> </think>")
    with torch.no_grad():
        model.head.weight[[close, tokenizer.end_id]] *= 0
    scheduler = Scheduler(model, tokenizer)
    for seed in range(400):
        if alone(
            model, tokenizer, Request(tokenizer.prompt(PROMPTS[0]), 2.0, max_new_tokens=1, seed=seed)
        ) == [think]:
            break
    request = Request(tokenizer.prompt(PROMPTS[0]), 2.0, max_new_tokens=12, seed=seed, thought_budget=3)
    answer = scheduler.submit(request)
    carry(scheduler)
    assert answer.choices[0].tokens[0] == think and answer.choices[0].tokens.index(close) == 4


def test_rows_that_nobody_wants_are_free_before_the_next_step(decoder, tokenizer):
    scheduler = Scheduler(decoder(max_positions=4096), tokenizer, rows=2)
    prompt = tokenizer.prompt(PROMPTS[0])
    first, second, third = (
        scheduler.submit(Request(prompt, max_new_tokens=2000, seed=i, ignore_eos=True)) for i in range(3)
    )
    with torch.inference_mode():
        for _ in range(4):
            scheduler.round()
        assert (scheduler.busy, len(scheduler.line)) == (2, 1)
        scheduler.cancel(first)
        scheduler.round()
        assert (scheduler.busy, len(scheduler.line)) == (2, 0) and third in {
            state.output for state in scheduler.serving_batch.owners
        }
        scheduler.enough(second.choices[0])
        scheduler.cancel(third)
        scheduler.round()
    assert scheduler.busy == 0 and first.done and second.done and third.done
    assert scheduler.serving_batch.cache.bytes == 0  # and what they held is given back


def test_who_does_not_fit_waits_in_line_or_is_sent_away(decoder, tokenizer):
    model, prompt = decoder(), tokenizer.prompt(PROMPTS[0])
    need = len(prompt) + 20
    scheduler = Scheduler(model, tokenizer, rows=64, max_waiting=4, max_tokens=2 * need)
    answers = [
        scheduler.submit(Request(prompt, max_new_tokens=20, seed=i, ignore_eos=True)) for i in range(4)
    ]
    with pytest.raises(QueueFull, match="4 requests are waiting") as caught:
        scheduler.submit(Request(prompt, max_new_tokens=20))
    assert caught.value.retry_after >= 1
    most = 0
    with torch.inference_mode():
        while scheduler.line or scheduler.busy:
            scheduler.round()
            most = max(most, scheduler.busy)
    assert most == 2 and [len(a.choices[0].tokens) for a in answers] == [20] * 4
    assert all(a.first <= b.first for a, b in pairwise(answers))


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [([], {}, "empty"), ([1] * 100, {"max_new_tokens": 29}, "128 positions"), ([1, -1], {}, "token ids"),
     ([10**6], {}, "token ids"),
     ([1], {"copies": 65}, "64 rows")],
)  # fmt: skip
def test_what_cannot_be_answered_is_said_at_once(decoder, tokenizer, prompt, changes, message):
    with pytest.raises(LimbeckError, match=message):
        Scheduler(decoder(), tokenizer).submit(
            Request(np.array(prompt, dtype=np.int64), **{"max_new_tokens": 9, **changes})
        )


def test_a_model_that_fails_tells_everybody_and_serves_the_next(decoder, tokenizer):
    told = []
    scheduler = Scheduler(decoder(), tokenizer, tell=told.extend)
    engine_thread = EngineThread([scheduler])
    engine_thread.start()
    broken, scheduler.serving_batch.step = scheduler.serving_batch.step, lambda: 1 / 0
    answer = scheduler.submit(Request(tokenizer.prompt(PROMPTS[0]), max_new_tokens=5))
    while not answer.done:
        pass
    assert isinstance(answer.error, ZeroDivisionError) and scheduler.failures == 1 and broken
    after = scheduler.submit(Request(tokenizer.prompt(PROMPTS[0]), max_new_tokens=5))
    while not after.done:
        pass
    assert after.error is None and after.choices[0].tokens
    engine_thread.close()
    assert answer in told and after in told
    with pytest.raises(LimbeckError, match="closing"):
        scheduler.submit(Request(tokenizer.prompt(PROMPTS[0]), max_new_tokens=5))


def test_what_was_read_is_remembered_within_its_room(decoder):
    config = decoder().config

    def past(tokens):
        made = SequenceKV(config, len(tokens))
        made.length = len(tokens)
        return made

    texts = [np.array(text) for text in ([1, 2, 3, 4], [1, 2, 9, 9, 9], [5, 6, 7])]
    size = past(texts[0]).bytes // 4
    prefixes = PrefixCache(10 * size)
    for text in texts:
        prefixes.add(text, past(text))
    assert prefixes.bytes == 8 * size and len(prefixes.sequences) == 2  # the first had to go
    assert prefixes.longest(np.array([1, 2, 3, 4, 5]))[1] == 2
    assert prefixes.longest(np.array([1, 2, 9, 9, 9]))[1] == 4  # never the last token
    assert prefixes.longest(np.array([8, 8])) == (None, 0)
    prefixes.add(np.array([1, 2, 9]), past([1, 2, 9]))  # the beginning of one that is known
    assert prefixes.bytes == 8 * size
    prefixes.add(np.array([5, 6, 7, 8, 8]), past([5, 6, 7, 8, 8]))  # takes the place of its beginning
    assert prefixes.bytes == 10 * size and common_prefix_length(np.array([5, 6]), np.array([5, 6, 7])) == 2


def test_the_nucleus_is_the_same_among_a_few_and_among_all():
    logits = torch.randn(
        5, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ) * torch.tensor([[0.01], [1], [3], [6], [9]])
    probabilities = logits.softmax(-1)
    together = nucleus(probabilities, 0.9)  # the first row needs nearly all, so all are sorted
    assert 2600 < int(together[0].sum()) < 2800
    for row in range(5):
        assert torch.equal(nucleus(probabilities[row : row + 1], 0.9)[0], together[row])
        kept = probabilities[row][together[row]]
        assert kept.sum() >= 0.9 > kept.sum() - kept.min()
