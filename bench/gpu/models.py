"""Models of random weights in the shapes of real ones, and problems of random tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from limbeck.model.config import Experts, Latent, ModelConfig
from limbeck.model.decoder import Decoder, rope_table
from limbeck.types import Problem

from .card import Card

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "family": "llama", "vocab_size": 49152, "hidden_size": 576, "layers": 30, "heads": 9, "kv_heads": 3,
        "head_dim": 64, "intermediate_size": 1536,
    },
    "0.5B": {
        "family": "qwen2", "vocab_size": 151936, "hidden_size": 896, "layers": 24, "heads": 14, "kv_heads": 2,
        "head_dim": 64, "intermediate_size": 4864, "qkv_bias": True,
    },
    "0.6B": {
        "family": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "layers": 28, "heads": 16,
        "kv_heads": 8, "head_dim": 128, "intermediate_size": 3072, "qk_norm": "before",
    },
    "1.5B": {
        "family": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "layers": 28, "heads": 12,
        "kv_heads": 2, "head_dim": 128, "intermediate_size": 8960, "qkv_bias": True,
    },
    "4B": {
        "family": "qwen3", "vocab_size": 151936, "hidden_size": 2560, "layers": 36, "heads": 32,
        "kv_heads": 8, "head_dim": 128, "intermediate_size": 9728, "qk_norm": "before",
    },
    "7B": {
        "family": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "layers": 28, "heads": 28,
        "kv_heads": 4, "head_dim": 128, "intermediate_size": 18944, "qkv_bias": True, "tied": False,
    },
    "experts": {  # each token meets 4 of 32 experts
        "family": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "layers": 16, "heads": 16,
        "kv_heads": 4, "head_dim": 128, "intermediate_size": 6144, "qk_norm": "before",
        "experts": Experts(32, 4, 768, normalize=True),
    },
    "latent": {  # the attention of DeepSeek-V2-Lite
        "family": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "layers": 12, "heads": 16,
        "kv_heads": 16, "head_dim": 192, "intermediate_size": 5504, "latent": Latent(512, 128, 64, 128),
    },
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16,
    "intermediate_size": 128,
}  # fmt: skip


def config(card: Card, shape: str, positions: int = 4096) -> ModelConfig:
    """Return the architecture of a shape; in a rehearsal a tiny one of the same kind."""
    sizes = SHAPES[shape]
    whole = ModelConfig(**sizes, rope_theta=1e6, max_positions=positions)
    if not card.rehearsed:
        return whole
    changes = dict(TINY)
    if whole.experts:
        changes["experts"] = replace(whole.experts, count=4, top_k=2, intermediate_size=32)
    if whole.latent:
        changes |= {"kv_heads": 4, "latent": Latent(16, 16, 8, 16), "head_dim": 24}
    return replace(whole, **changes)


def decoder(card: Card, shape: str, positions: int = 4096, exact: bool = True) -> Decoder:
    """Return a decoder of random weights on the card; its next token is neither open nor certain."""
    torch.set_default_dtype(card.dtype)
    try:
        with torch.device(card.device):
            model = Decoder(config(card, shape, positions))
    finally:
        torch.set_default_dtype(torch.float32)
    model.cos, model.sin = (angles.to(card.device) for angles in rope_table(model.config))
    generator = torch.Generator(card.device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = 0.1 if "embed" in name else weight.shape[-1] ** -0.5
                weight.normal_(0.0, scale, generator=generator)
            elif "bias" in name:
                weight.normal_(0.0, 0.1, generator=generator)
    return card.place(model, exact)


def weight_sizes(sizes: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """Yield the name, the outputs and the inputs of each kind of weight of a block."""
    heads = sizes.heads + 2 * sizes.kv_heads
    yield "qkv", heads * sizes.head_dim, sizes.hidden_size
    yield "out", sizes.hidden_size, sizes.heads * sizes.head_dim
    yield "gate_up", 2 * sizes.intermediate_size, sizes.hidden_size
    yield "down", sizes.hidden_size, sizes.intermediate_size


class Ids:
    """A tokenizer whose texts are token ids."""

    end_id = 0

    def prompt(self, text: str) -> np.ndarray:
        """Return the ids [N] that a text names."""
        return np.array([int(word) for word in text.split()])

    def decode(self, tokens: np.ndarray) -> str:
        """Return no text."""
        return ""


def problems(count: int, length: int, largest: int, seed: int = 0) -> list[Problem]:
    """Return problems of about so many random token ids below `largest`."""
    ids = np.random.default_rng(seed)
    prompts = [ids.integers(1, largest, length + i % 7) for i in range(count)]
    return [Problem(id=f"{seed}-{i}", prompt=" ".join(map(str, each))) for i, each in enumerate(prompts)]


def largest_id(card: Card) -> int:
    """Return the bound of the token ids of problems."""
    return card.size(10_000, TINY["vocab_size"])


def nano_vllm_workload(card: Card) -> tuple[list[list[int]], list[int]]:
    """Return the prompts and the numbers of tokens to sample of nano-vllm's `bench.py`: 256 sequences of 100
    to 1,024 tokens in and out."""
    random.seed(0)
    count, least, most = card.size((256, 100, 1024), (4, 10, 40))
    largest = largest_id(card) - card.size(0, 1)
    prompts = [[random.randint(0, largest) for _ in range(random.randint(least, most))] for _ in range(count)]
    return prompts, [random.randint(least, most) for _ in range(count)]
