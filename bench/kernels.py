"""Three of the learner's pieces against the plain way: time, and that they compute the same.

    python -m bench.kernels

Each side in turn, seven times; medians of processor time on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from limbeck.model import cache
from limbeck.model.attention import Layer, RMSNorm
from limbeck.model.cache import Packed
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.parts import Optimizer, Policy
from limbeck.train import batch as batching
from limbeck.train.learner import Learner
from limbeck.train.losses import policy_gradient
from limbeck.types import Sample

REPEATS = 7


def main() -> None:
    torch.set_num_threads(1)
    norm()
    for length in (512, 2048, 4096, 8192):
        attention(length)
    prompts_once(prompt=10, longest=150, label="miniature")
    prompts_once(prompt=46, longest=20, label="short answers to longer prompts")


def norm() -> None:
    """RMSNorm forward and backward on 4,000 x 64."""
    ours, x = RMSNorm(64, 1e-6), torch.randn(4000, 64, requires_grad=True)

    def run(make: Callable[[], torch.Tensor]) -> None:
        for _ in range(20):
            make().backward(torch.ones_like(x))

    plain, fast = compare(lambda: run(lambda: F.rms_norm(x, (64,), ours.weight, 1e-6)), lambda: run(lambda: ours(x)))
    print(f"rms_norm, forward and backward: torch {plain / 20 * 1e3:.2f} ms, ours {fast / 20 * 1e3:.2f} ms")


def attention(length: int) -> None:
    """One sequence, SmolLM2's heads (9 on 3 of 64): where torch's walk over keys in tiles overtakes ours."""
    given = [torch.randn(length, heads, 64, requires_grad=True) for heads in (9, 3, 3)]

    def run(most: int) -> None:
        cache.LONG = most
        mixed = Packed([length]).attend(Layer(0, 0.125, 0), *given)
        mixed.backward(torch.ones_like(mixed))

    plain, fast = compare(lambda: run(0), lambda: run(length))
    gflop = 3.5 * 2 * length**2 * 9 * 64 / 1e9
    print(f"attention on {length} tokens, forward and backward: torch {gflop / plain:.1f} GFLOP/s, ours {gflop / fast:.1f}")


def prompts_once(prompt: int, longest: int, label: str) -> None:
    """Forward and backward of 32 groups of 8: every sequence in full, or each prompt once."""
    dice = np.random.default_rng(0)
    samples = [
        Sample(np.concatenate([asked, dice.integers(0, 63, n)]), prompt, float(dice.normal()), dice.normal(-2, 0.3, n).astype(np.float32))
        for asked in dice.integers(0, 63, (32, prompt)) for n in dice.integers(1, longest, 8)
    ]  # fmt: skip
    learner = Learner(Decoder(ModelConfig("llama", 63, 64, 3, 4, 4, 16, 176)).initialize(0), Optimizer(), 1)
    loss = policy_gradient(Policy(), longest)

    def gradient(cut: list[batching.Batch]) -> torch.Tensor:
        for piece in cut:
            loss(learner.forward(piece, 1.0)[0], piece)[0].backward()
        found = torch.cat([p.grad.flatten() for p in learner.model.parameters()])
        learner.model.zero_grad(set_to_none=True)
        return found

    shared, full = batching.pack(samples, 4096), in_full(samples)
    gap = (gradient(shared) - gradient(full)).norm() / gradient(full).norm()
    plain, fast = compare(lambda: gradient(full), lambda: gradient(shared))
    print(f"{label}: in full {plain:.2f} s, prompts once {fast:.2f} s; gradients differ by {gap:.1e}")


def in_full(samples: list[Sample]) -> list[batching.Batch]:
    """The same batch with every sequence alone."""
    alone, batching._by_prompt = batching._by_prompt, lambda found: [[sample] for sample in found]
    try:
        return batching.pack(samples, 4096)
    finally:
        batching._by_prompt = alone


def compare(one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of processor time of each, taken in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for side, work in zip(times, (one, other), strict=True):
            began = time.process_time()
            work()
            side.append(time.process_time() - began)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
