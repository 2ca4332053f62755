"""Models of random weights in the shapes of real ones, and problems of random tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch

from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder, rope_table
from limbeck.model.ops import place
from limbeck.types import Problem

SHAPES = {
    "0.5B": {
        "family": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "head_dim": 64,
        "intermediate_size": 4864,
        "qkv_bias": True,
    },
    "0.6B": {
        "family": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "layers": 28,
        "heads": 16,
        "kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "qk_norm": "before",
    },
    "1.5B": {
        "family": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "layers": 28,
        "heads": 12,
        "kv_heads": 2,
        "head_dim": 128,
        "intermediate_size": 8960,
        "qkv_bias": True,
    },
    "4B": {
        "family": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "layers": 36,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "qk_norm": "before",
    },
    "7B": {
        "family": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "head_dim": 128,
        "intermediate_size": 18944,
        "qkv_bias": True,
        "tied": False,
    },
}


def config(shape: str, positions: int = 4096) -> ModelConfig:
    """Return the architecture of a shape."""
    return ModelConfig(**SHAPES[shape], rope_theta=1e6, max_positions=positions)


def decoder(shape: str, positions: int = 4096, exact: bool = True) -> Decoder:
    """Return a decoder of random weights in bf16 on the card; its next token is neither open nor certain."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Decoder(config(shape, positions))
    finally:
        torch.set_default_dtype(torch.float32)
    model.cos, model.sin = (angles.cuda() for angles in rope_table(model.config))
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = 0.1 if "embed" in name else weight.shape[-1] ** -0.5
                weight.normal_(0.0, scale, generator=generator)
            elif "bias" in name:
                weight.normal_(0.0, 0.1, generator=generator)
    return place(model, "cuda", exact=exact)


def weight_sizes(shape: str) -> Iterator[tuple[str, int, int]]:
    """Yield the name, the outputs and the inputs of each kind of weight of a block."""
    sizes = config(shape)
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


def problems(count: int, length: int, seed: int = 0) -> list[Problem]:
    """Return problems of about so many random token ids."""
    ids = np.random.default_rng(seed)
    prompts = [ids.integers(1, 10000, length + i % 7) for i in range(count)]
    return [Problem(id=f"{seed}-{i}", prompt=" ".join(map(str, each))) for i, each in enumerate(prompts)]


def nano_vllm_workload() -> tuple[list[list[int]], list[int]]:
    """Return the prompts and the numbers of tokens to sample of nano-vllm's `bench.py`: 256 sequences."""
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    return prompts, [random.randint(100, 1024) for _ in range(256)]
