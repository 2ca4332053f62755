"""Every operation of the kernels against torch on this machine, and an update that computes prompts once.

    python -m bench.kernels
    LIMBECK_MARCH=x86-64-v3 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m bench.kernels

What is used was chosen before (`limbeck doctor` shows it); here it is timed again, each side in turn,
fifteen times: medians of one thread. No operation may be slower than torch's beyond what noise explains.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle

import numpy as np
import torch

from limbeck.config.parts import Optimizer, Policy
from limbeck.model import kernels
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.kernels import choice, trials
from limbeck.model.linear import Linear
from limbeck.train import batch as batching
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient
from limbeck.types import Sample

REPEATS, TURNS = 7, 15


def main() -> None:
    """Time every operation and print its ratio to plain torch."""
    torch.set_num_threads(1)
    print(f"kernels: {kernels.instructions()}; torch: {torch.backends.cpu.get_cpu_capability()}\n")
    ratios = [*products(), *operations()]
    print(
        f"\nthe slowest of {len(ratios)}: {min(ratios):.2f}x of plain torch's speed; "
        f"median {statistics.median(ratios):.2f}x\n"
    )
    prompts_once(prompt=10, longest=150, label="miniature")
    prompts_once(prompt=46, longest=20, label="short answers to longer prompts")


def products() -> list[float]:
    """Layers without a gradient, for every class of rows and weights: the model's `Linear` and torch's."""
    ratios = []
    for columns, inner in trials.WEIGHTS:
        for rows in trials.MOST:
            x, layers = torch.randn(rows, inner), [Linear(inner, columns, bias=False) for _ in range(12)]
            plain = [torch.nn.Linear(inner, columns, bias=False, device="meta") for _ in layers]
            for theirs, mine in zip(plain, layers, strict=True):
                theirs.weight = mine.weight  # from memory, as in a model, and from the same place
            sides = [walk(x, kind) for kind in (layers, plain)]
            with torch.no_grad():
                ours, plain = choice.interleaved(*sides, turns=TURNS)
            ratios.append(tell("product", f"{rows} x {inner}, weight {columns} x {inner}", ours, plain))
    return ratios


def walk(x: torch.Tensor, layers: list[torch.nn.Module]) -> Callable[[], torch.Tensor]:
    """A function that applies the next of the layers to `x` [N, D] at each call."""
    turns = cycle(layers)
    return lambda: next(turns)(x)


def operations() -> list[float]:
    """Everything else, most of it forward and backward."""
    ratios = []
    for name, operation in trials.OPERATIONS.items():
        for shape, make in operation.trials:
            work = make()
            used = kernels.current().used[name][operation.trials.index((shape, make))]
            ours, plain = choice.interleaved(work, work, turns=TURNS, forcing=(name, (used, False)))
            ratios.append(tell(name, shape, ours, plain))
    return ratios


def tell(name: str, shape: str, ours: float, plain: float) -> float:
    """Print one comparison, in seconds, and return the speedup."""
    print(
        f"{name:10} {shape:40} used {1e6 * ours:10,.1f} us  torch {1e6 * plain:10,.1f} us  "
        f"{plain / ours:5.2f}x",
        flush=True,
    )
    return plain / ours


def prompts_once(prompt: int, longest: int, label: str) -> None:
    """Forward and backward of 32 groups of 8: every sequence in full, or each prompt once."""
    dice = np.random.default_rng(0)
    samples = [
        Sample(
            np.concatenate([asked, dice.integers(0, 63, n)]),
            prompt,
            float(dice.normal()),
            dice.normal(-2, 0.3, n).astype(np.float32),
        )
        for asked in dice.integers(0, 63, (32, prompt))
        for n in dice.integers(1, longest, 8)
    ]
    learner = Learner(Decoder(ModelConfig("llama", 63, 64, 3, 4, 4, 16, 176)).initialize(0), Optimizer(), 1)
    loss = PolicyGradient(Policy(), longest)

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
    grouped = batching._grouped
    batching._grouped = lambda learned: [[sample] for sample in learned]
    try:
        return batching.pack(samples, 4096)
    finally:
        batching._grouped = grouped


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
