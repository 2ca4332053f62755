"""The memory of an update on a card: foreseen from settings, and counted in a real one. A card's operations
run with functions of torch for kernels (counted.py), so what is kept for the backward pass is the code's
own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import counted
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from limbeck.config.parts import LoRA as Adapters
from limbeck.config.parts import Optimizer, Policy
from limbeck.model.config import Experts, Latent, ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.lora import LoRA
from limbeck.model.ops import place, use
from limbeck.model.packed import Packed
from limbeck.plan import activations, card_runs
from limbeck.plan.micro_batch import MicroBatch
from limbeck.plan.stage_memory import Learning
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy, PolicyGradient
from limbeck.types import Sample

LLAMA = ModelConfig("llama", 512, 64, 6, 4, 4, 16, 176, max_positions=1024)
QWEN3 = replace(LLAMA, family="qwen3", kv_heads=2, qk_norm="before", tied=False)
WIDE = ModelConfig("qwen2", 2048, 128, 2, 4, 2, 32, 512, qkv_bias=True, max_positions=1024)
LATENT = ModelConfig(
    "deepseek_v3", 512, 64, 4, 4, 4, 24, 176, latent=Latent(64, 16, 8, 16, 48), max_positions=1024
)
HEADS = replace(LATENT, heads=16, kv_heads=16, latent=Latent(128, 16, 8, 16, 48))
EXPERTS = replace(
    LATENT, experts=Experts(8, 2, 96, 96, sigmoid=True, balanced=True, normalize=True, dense=(0,))
)
AHEAD = replace(LATENT, layers=3, predicted=1)
GEMMA3 = replace(
    QWEN3, family="gemma3", tied=True, windows=(64, 0, 64, 64, 0, 64), gelu=True, norms_from_one=True,
    post_norms=True, scaled_embeddings=True, local_theta=1000.0,
)  # fmt: skip
LONG = (300, 250, 200)
SHORT = (30, 25, 20)
UNITS = 8  # multiprocessors of a small card: an H100's sums of gradients would hide all else here


def samples(lengths: tuple[int, ...], prompt: int, taught: bool) -> list[Sample]:
    """Sequences of random tokens; with `prompt`, completions of one prompt."""
    random = np.random.default_rng(0)
    start = random.integers(0, 512, prompt)
    found = []
    for length in lengths:
        tokens = np.concatenate([start, random.integers(0, 512, length + (prompt == 0))])
        predicted = len(tokens) - max(prompt, 1)
        logprobs = None if taught else np.full(predicted, -5.0, np.float32)
        found.append(Sample(tokens, start=max(prompt, 1), advantage=1.0, logprobs=logprobs))
    return found


def count(
    config: ModelConfig, half: bool, lengths, prompt: int, batch_tokens: int, recompute, lora, **settings
):
    """The peak of an update, counted, and the micro-batch that it had, the largest first."""
    model = place(Decoder(config).initialize(0), "cpu", torch.bfloat16 if half else None)
    use(model, counted.card_ops())
    adapters = LoRA(model, lora, 0) if lora else None
    learner = Learner(model, Optimizer(**settings), 10, recompute, adapters)
    ahead = bool(config.predicted)
    rows = samples(lengths, prompt, ahead)
    loss = CrossEntropy() if ahead else PolicyGradient(Policy(), 100)
    offload = bool(settings.get("offload"))

    def update() -> None:
        batches = learner.pack(rows, batch_tokens)
        learner.accumulate(batches, loss) if offload else learner.update(batches, loss)

    def held() -> Iterator[Tensor]:
        yield from (*model.parameters(), *model.buffers(), *learner.trained.values())
        if not offload:
            yield from (
                leaf for leaf in tree_iter(learner.optimizer.state_dict()) if isinstance(leaf, Tensor)
            )
        yield from (layer.adapter.base_OC for layer in adapters.layers.values()) if adapters else ()

    learner.update(learner.pack(rows, batch_tokens), loss)  # makes the moments
    largest = max(reversed(learner.pack(rows, batch_tokens)), key=lambda batch: len(batch.tokens_N))
    return counted.peak_bytes(update, held()), largest


def both(
    config: ModelConfig,
    monkeypatch,
    half=True,
    lengths=LONG,
    prompt=0,
    batch_tokens=4096,
    recompute=False,
    lora=None,
    **settings,
) -> tuple[int, float]:
    """Bytes counted and bytes foreseen."""
    monkeypatch.setattr(counted, "UNITS", UNITS)
    monkeypatch.setattr(activations, "LOGITS", counted.LOGITS)
    bytes_seen, batch = count(config, half, lengths, prompt, batch_tokens, recompute, lora, **settings)
    tokens = len(batch.tokens_N)
    shared = len(batch.order_S) * prompt if prompt else 0
    micro = MicroBatch(
        tokens=tokens,
        predicted=len(batch.predict_M),
        longest=max(lengths) + prompt,
        sequences=len(batch.order_S) + bool(prompt),
        keys=tokens + shared,
        several=tokens < sum(lengths),
        ahead=bool(config.predicted),
    )
    learning = Learning(config, 2 if half else 4, micro, Optimizer(**settings), recompute, lora, UNITS)
    foreseen = list(learning.at_times())[1 if settings.get("offload") else 0 :]  # the first is the step
    return bytes_seen, max(memory.total for memory in foreseen)


SETTINGS = {
    "adamw": {},
    "float32": {"half": False},
    "keep_attention": {"recompute": "keep_attention"},
    "recompute": {"recompute": True},
    "muon": {"name": "muon"},
    "muon, short": {"name": "muon", "lengths": SHORT},
    "adapters": {"lora": Adapters(rank=4)},
    "two micro-batches": {"batch_tokens": 300, "lengths": (300, 150, 150)},
    "one prompt": {"prompt": 60},
    "short": {"lengths": SHORT},
    "8 bits": {"moments": "int8", "lengths": SHORT},
    "8 bits, float32": {"moments": "int8", "lengths": SHORT, "half": False},
    "no masters": {"masters": False, "lengths": SHORT},
    "no masters, 8 bits": {"masters": False, "moments": "int8", "lengths": SHORT},
    "offload": {"offload": True},
}
MODELS = {
    "llama": LLAMA, "qwen3": QWEN3, "wide": WIDE, "gemma3": GEMMA3, "latent": HEADS, "experts": EXPERTS,
    "ahead": AHEAD,
}  # fmt: skip


def tried(model: str, name: str) -> bool:
    """False for what is tried with other models, and for shared keys in float32, for which a card takes
    another attention than a CPU."""
    config, settings = MODELS[model], SETTINGS[name]
    if name in OF_THE_OPTIMIZER and model not in ("wide", "experts"):
        return False  # the optimizer sees weights alone
    grouped = config.kv_heads < config.heads and not settings.get("half", True)
    return not grouped


OF_THE_OPTIMIZER = {"short", "8 bits", "8 bits, float32", "no masters", "no masters, 8 bits", "offload"}
GRID = [(model, name) for model in MODELS for name in SETTINGS if tried(model, name)]


@pytest.mark.parametrize(("model", "name"), GRID)
def test_foreseen_within_a_tenth_of_what_is_counted(model, name, monkeypatch):
    seen, foreseen = both(MODELS[model], monkeypatch, **SETTINGS[name])
    print(f"{model}, {name}: {seen:,} bytes counted, {foreseen:,.0f} foreseen, {foreseen / seen - 1:+.1%}")
    assert foreseen == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize("model", MODELS)
def test_a_forward_pass_without_gradients(model):
    """As reading and prompts have it."""
    config, tokens = MODELS[model], sum(LONG)
    decoder = place(Decoder(config).initialize(0), "cpu", torch.bfloat16)
    use(decoder, counted.card_ops())
    context, tokens_N = Packed(LONG), torch.zeros(tokens, dtype=torch.long)
    held = [*decoder.parameters(), *decoder.buffers()]
    with torch.no_grad():
        seen = counted.peak_bytes(lambda: decoder(tokens_N, context), held) - counted.peak_bytes(int, held)
    passes = activations.Activations(config, 2, MicroBatch(tokens, 0, LONG[0], len(LONG), tokens), UNITS)
    foreseen = max(passes.forward(layer) for layer in range(config.layers))
    print(f"{model}: {seen:,} bytes counted, {foreseen:,.0f} foreseen, {foreseen / seen - 1:+.1%}")
    assert foreseen == pytest.approx(seen, rel=0.1)


def test_counting_sees_what_is_alive_and_what_was_freed():
    held = torch.zeros(100, dtype=torch.float32)

    def run() -> None:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(500)
        second.view(5, 100).add_(1)

    assert counted.peak_bytes(run, [held]) == 400 + 4000


def test_updates_that_were_seen_on_an_h100():
    """The 0.6B shape in bfloat16, AdamW with masters, attention kept (docs/explanation/gpu.md)."""
    runs = [run for run in card_runs.card_runs() if run.unit == "GiB"]
    assert len(runs) == 2
    for run in runs:
        print(run.tell())
        assert run.foreseen == pytest.approx(run.seen, rel=0.02)
