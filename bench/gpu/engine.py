"""The engine on a card: rollouts, decode steps, nano-vllm's workload, experts and latent attention."""

from __future__ import annotations

import time

import numpy as np
import torch

from limbeck.engine.device_batch import DeviceBatch
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model.decoder import Decoder
from limbeck.model.ops.table import BLOCK
from limbeck.train.batch import pack, to_samples
from limbeck.train.scorer import Scorer
from limbeck.types import Group, LimbeckError

from .card import Card
from .kernels import copy_rate
from .models import Ids, decoder, largest_id, nano_vllm_workload, problems
from .report import note, promise, spare


def decode_part(card: Card, quick: bool) -> None:
    """Time a captured step beside its floor, the bytes of weights, keys and values, 1,000 tokens a row."""
    context = card.size(1000, 40)
    for shape in ("0.5B",) if quick else ("0.5B", "1.5B", "7B"):
        if not spare("decode", shape, card.size(5, 0)):
            continue
        model = decoder(card, shape)
        sizes = model.config
        width = model.embed.weight.element_size()
        weights = width * sum(p.numel() for p in model.parameters())
        if not sizes.tied:
            weights -= width * model.embed.weight.numel()  # of which a step reads a few rows
        for rows in card.size((1, 64, 256), (1, 3)):
            took = _time_step(card, model, rows, context) * 1e3
            cached = 2 * width * sizes.layers * rows * context * sizes.kv_heads * sizes.head_dim
            floor_ms = (weights + cached) / copy_rate(card) * 1e3
            note("decode", shape=shape, rows=rows, ms=took, floor_ms=floor_ms, share=floor_ms / took)
            card.free()
        del model
        card.free()


def _time_step(card: Card, model: Decoder, rows: int, context: int) -> float:
    """Return the seconds of one step of so many rows, each with `context` tokens."""
    batch = DeviceBatch(model, 0, SamplingParams(max_new_tokens=64), rows, context)
    prompts = [(i, np.arange(1, context + 1)) for i in range(rows)]
    with torch.no_grad():
        batch.admit(prompts, np.random.rand(rows, 64), 1)
        return card.seconds(batch.capture(rows), 20)


def rollout_part(card: Card, quick: bool) -> None:
    """Sample 32 groups of 8 x 256 tokens; compare them alone, and with the learner's forward pass."""
    for shape in ("0.5B",) if quick else ("0.5B", "1.5B", "0.6B"):
        if spare("rollout", shape, card.size(5, 0)):
            _rollout(card, "rollout", shape, card.size(32, 2))
        card.free()


def mixture_part(card: Card, quick: bool) -> None:
    """The same for a mixture of experts and for latent attention, half as many groups."""
    for shape in ("experts", "latent"):
        if spare("mixture", shape, card.size(5, 0)):
            try:
                _rollout(card, "mixture", shape, card.size(16, 2))
            except LimbeckError as refusal:
                note("mixture", shape=shape, left_out=str(refusal))
        card.free()


def _rollout(card: Card, part: str, shape: str, count: int) -> None:
    """Sample `count` groups with a model of one shape, and check what is promised of them."""
    model = decoder(card, shape)
    engine = Engine(model, Ids(), rows=256)
    sampling = SamplingParams(max_new_tokens=card.size(256, 12))
    few = problems(count, card.size(120, 20), largest_id(card))
    engine.rollout(few, 8, sampling, 0)
    groups: list[Group] = []
    took = card.once(lambda: groups.extend(engine.rollout(few, 8, sampling, 1)))
    tokens = sum(len(c.tokens) for g in groups for c in g.completions)
    note(part, shape=shape, tokens=tokens, seconds=took, tokens_s=round(tokens / took), GiB=card.peak())
    alone = engine.rollout(few[:2], 8, sampling, 1)
    same = all(
        np.array_equal(c.tokens, d.tokens) and np.array_equal(c.logprobs, d.logprobs)
        for g, h in zip(groups, alone, strict=False)
        for c, d in zip(g.completions, h.completions, strict=True)
    )
    promise(part, f"{shape}: the same tokens and bits alone and in company", same)
    _parity(card, part, shape, model, groups)
    promise(part, f"{shape}: a step never waits for the host", _never_waits(card, part, engine))
    if shape == "0.5B" and spare(part, f"{shape}, top-p", card.size(3, 0)):
        nucleus = SamplingParams(0.7, 0.9, card.size(64, 8), keep_mask=True, top_k=50)
        groups = engine.rollout(few[:4], 8, nucleus, 2)
        _parity(card, part, f"{shape}, temperature 0.7, top-p 0.9, top-k 50", model, groups, nucleus)


def _parity(
    card: Card,
    part: str,
    what: str,
    model: Decoder,
    groups: list[Group],
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
) -> None:
    """Compare the log-probabilities of a rollout with those of the learner."""
    samples = to_samples(groups, [[0.5, -0.5] * 4] * len(groups), sampling.keep_mask)
    batches = pack(samples, 16384, card.device)
    equal = total = 0
    worst = 0.0
    scores = Scorer(model).logprobs(batches, sampling.temperature)
    for batch, logprobs_M in zip(batches, scores, strict=True):
        equal += int((logprobs_M == batch.logprobs_M).sum())
        total += len(logprobs_M)
        worst = max(worst, float((logprobs_M - batch.logprobs_M).abs().max()))
    note(part, shape=what, equal_bits=equal / total, tokens=total, worst=worst)
    promise(part, f"{what}: sampler = learner, bit for bit", equal == total)


def _never_waits(card: Card, part: str, engine: Engine) -> bool:
    """Return True if steps run while waiting for the card is an error."""
    steps = engine._device_batch._steps
    try:
        with card.no_waiting(), torch.no_grad():
            for _ in range(4):
                steps[max(steps)]()
    except RuntimeError as problem:
        note(part, waits=str(problem)[:100])
        return False
    return True


def workload_part(card: Card, quick: bool) -> None:
    """nano-vllm's workload in a Qwen3-0.6B shape: 256 sequences of 100 to 1,024 tokens in and out."""
    prompts, limits = nano_vllm_workload(card)
    model = decoder(card, "0.6B")
    blocks = sum(-(-(len(p) + n) // BLOCK) for p, n in zip(prompts, limits, strict=True))
    longest = max(limits)
    sampling = SamplingParams(temperature=0.6, max_new_tokens=longest)
    batch = DeviceBatch(model, 0, sampling, len(prompts), max(map(len, prompts)), blocks)
    batch.is_stop_V.zero_()
    for turn in ("first", "captured"):
        card.wait()
        begin = time.perf_counter()
        done = 0
        with torch.no_grad():
            tokens = [(i, np.array(p)) for i, p in enumerate(prompts)]
            batch.admit(tokens, np.random.rand(len(prompts), longest), 1, limits)
            card.wait()
            prefill = time.perf_counter() - begin
            while batch.busy:
                done += sum(len(sequence.tokens) for sequence in batch.step())
        took = time.perf_counter() - begin
        rates = {"prefill_s": prefill, "tokens_s": round(done / took), "GiB": card.peak()}
        note("workload", turn=turn, tokens=done, seconds=took, **rates)
    promise("workload", "every sequence has its number of tokens", done == sum(limits))
