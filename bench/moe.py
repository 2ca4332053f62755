"""One mixture-of-experts layer against transformers' ways of computing the same, and against a dense layer.

    python -m bench.moe                    # one thread; needs `pip install transformers`
    python -m bench.moe --threads 2

DeepSeek-V3's layer, 4 experts of E and a shared one, on the same weights; forward, and forward plus
backward. Each round runs every side once, so that a disturbance hits all; medians of the rounds in
milliseconds, with quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from limbeck.model.config import Experts, ModelConfig
from limbeck.model.ffn import MixtureOfExperts, SwiGLU
from limbeck.model.kv_cache import Packed

SIZES = [
    (128, 64, 16, 64),
    (128, 64, 16, 4096),
    (384, 192, 32, 64),
    (384, 192, 32, 4096),
]  # hidden, expert, E, tokens


def main() -> None:
    """Time every side and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        "| hidden | expert | experts | tokens | side | forward | forward + backward |\n"
        "|---|---|---|---|---|---|---|"
    )
    for hidden, width, count, tokens in SIZES:
        sides = build(hidden, width, count, tokens)
        timed = measure(sides, options.rounds)
        for name, (forward, both) in timed.items():
            print(
                f"| {hidden} | {width} | {count} | {tokens} | {name} | {told(forward)} | {told(both)} |",
                flush=True,
            )
        ours, best = (
            timed["limbeck"],
            min((t for n, t in timed.items() if "transformers" in n), key=lambda t: statistics.median(t[1])),
        )
        ratios = [statistics.median(b) / statistics.median(o) for o, b in zip(ours, best, strict=True)]
        print(
            f"\nfaster than transformers' best {ratios[0]:.2f}x forward, {ratios[1]:.2f}x both; "
            f"{statistics.median(ours[1]) / statistics.median(timed['dense, equal active'][1]):.2f}x "
            "of dense\n"
        )


def build(hidden: int, width: int, count: int, tokens: int) -> dict[str, tuple[nn.Module, Callable]]:
    """Every side with a function that runs it."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    experts = Experts(count, 4, width, width, sigmoid=True, balanced=True, normalize=True, scale=2.5)
    config = ModelConfig("deepseek_v3", 8, hidden, 1, 1, 1, hidden, width, experts=experts)
    ours, x, context = (
        MixtureOfExperts(config),
        torch.randn(tokens, hidden, requires_grad=True),
        Packed([tokens]),
    )
    for weight in ours.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, weight.shape[-1] ** -0.5)
    dense = SwiGLU(hidden, 5 * width)
    sides: dict[str, tuple[nn.Module, Callable]] = {
        "limbeck": (ours, lambda: ours(x, context)),
        "dense, equal active": (dense, lambda: dense(x)),
    }
    for way in ("eager", "grouped_mm"):
        theirs = DeepseekV3MoE(
            DeepseekV3Config(
                hidden_size=hidden,
                moe_intermediate_size=width,
                n_routed_experts=count,
                num_experts_per_tok=4,
                n_group=1,
                topk_group=1,
                experts_implementation=way,
            )
        )
        theirs.experts.gate_up_proj.data.copy_(ours.experts_gate_up)
        theirs.experts.down_proj.data.copy_(ours.experts_down)
        theirs.gate.weight.data.copy_(ours.router.weight)
        gate, up = ours.shared.gate_up.weight.chunk(2)
        for module, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", ours.shared.down.weight)):
            getattr(theirs.shared_experts, module).weight.data.copy_(weight)
        torch.testing.assert_close(theirs(x[None])[0], ours(x, context), atol=1e-4, rtol=1e-3)
        sides[f"transformers, {way}"] = (theirs, lambda theirs=theirs: theirs(x[None]))
    return sides


def measure(
    sides: dict[str, tuple[nn.Module, Callable]], rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of each round, forward alone and with backward; the first (warm-up) round is dropped."""
    times = {name: ([], []) for name in sides}
    for _ in range(rounds + 1):
        for name, (module, run) in sides.items():
            with torch.no_grad():
                times[name][0].append(clock(run))
            times[name][1].append(clock(lambda run=run: run().square().mean().backward()))
            module.zero_grad(set_to_none=True)
    return {name: (forward[1:], both[1:]) for name, (forward, both) in times.items()}


def clock(run: Callable) -> float:
    """Milliseconds of one call."""
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def told(times: list[float]) -> str:
    """Median and quartiles as text."""
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
