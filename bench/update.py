"""One policy-gradient update against the same by transformers with padding; and useful GFLOP/s.

    python -m bench.update --size tiny
    python -m bench.update --size 135m --lengths skewed --threads 2

Useful work is that of every prompt once and every completion, forward and backward (3 x forward); what is
computed again, or for padding, is not useful.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from limbeck.model.config import ModelConfig

from . import models
from .sides import Side, alternate, python_of, roofline, tell

# prompts, completions of each, longest completion, prompt tokens
WORK = {"tiny": (8, 8, 64, 64), "10m": (8, 8, 64, 64), "135m": (2, 8, 32, 64)}


def main() -> None:
    """Compare both sides and print their times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(WORK), default="tiny")
    parser.add_argument("--lengths", choices=["fixed", "skewed"], default="fixed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts, group, new, width = WORK[options.size]
    drawn = np.random.default_rng(0).exponential(new / 3, group).clip(1, new).astype(int).tolist()
    lengths = [new] * group if options.lengths == "fixed" else drawn
    folder = models.make(options.size)
    settings = {
        "model": str(folder),
        "prompts": prompts,
        "lengths": lengths,
        "new": new,
        "width": width,
        "batch_tokens": 4096,
    }
    sides = [Side("limbeck", "limbeck_update.py", sys.executable, settings, options.threads)]
    if not options.alone:
        sides.append(
            Side(
                "transformers", "transformers_update.py", python_of("transformers"), settings, options.threads
            )
        )
    timed, roof = alternate(sides, options.repeats), roofline(options.threads)
    work = useful(ModelConfig.from_directory(folder), prompts, lengths, width)
    for side in timed.values():
        side.medians["useful_gflops"] = work / side.seconds[1] / 1e9
    facts = {"size": options.size, "lengths": options.lengths, "threads": options.threads}
    tell(
        f"update, {options.size}, {options.lengths} lengths, {options.threads} thread(s)",
        timed,
        roof,
        options.json,
        **facts,
    )


def useful(config: ModelConfig, prompts: int, lengths: list[int], width: int) -> float:
    """FLOPs forward and backward; the head only for what is predicted."""
    head = 3 * 2 * config.vocab_size * config.hidden_size
    once = width * (config.flops_per_token(width / 2, backward=True) - head) + head
    each = sum(n * config.flops_per_token(width + n / 2, backward=True) for n in lengths)
    return prompts * (once + each)


if __name__ == "__main__":
    main()
