"""One GRPO step against TRL's GRPOTrainer: rollout, rewards, update, new weights.

    python -m bench.grpo --size tiny                    # against TRL, lengths fixed, one thread
    python -m bench.grpo --size 10m --lengths skewed --threads 2 --json bench.jsonl

Both sides load the same random weights and read the same prompts, and take turns. `fixed` lengths are all
at the limit; `skewed` ones end at random, with a mean of a third of it, as answers do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import models
from .sides import Side, alternate, python_of, roofline, tell

# prompts, group, new tokens, prompt tokens
WORK = {"tiny": (8, 8, 64, 64), "10m": (8, 8, 64, 64), "135m": (2, 8, 32, 64)}


def main() -> None:
    """Compare both sides and print their times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", choices=["trl"], default="trl")
    parser.add_argument("--size", choices=list(WORK), default="tiny")
    parser.add_argument("--lengths", choices=["fixed", "skewed"], default="fixed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = work(options.size, options.lengths)
    sides = [
        Side("limbeck", "limbeck_grpo.py", sys.executable, settings, options.threads),
        Side("trl", "trl_grpo.py", python_of("trl"), settings, options.threads),
    ]
    timed = alternate(sides, options.repeats)
    title = f"GRPO step, {options.size}, {options.lengths} lengths, {options.threads} thread(s)"
    tell(
        title,
        timed,
        roofline(options.threads),
        options.json,
        size=options.size,
        lengths=options.lengths,
        threads=options.threads,
    )


def work(size: str, lengths: str) -> dict:
    """The settings of a worker: model, prompts, groups, lengths."""
    prompts, group, new, width = WORK[size]
    vocabulary = models.SIZES[size][0]
    return {
        "model": str(models.make(size)),
        "prompts": prompts,
        "group": group,
        "new": new,
        "fixed": lengths == "fixed",
        "texts": models.prompts(prompts, width, vocabulary),
        "batch_tokens": 8192,
        "stop": [] if lengths == "fixed" else list(range(round(stop_share(new) * vocabulary))),
    }


def stop_share(new: int) -> float:
    """The chance to end at each token that makes the mean length a third of `new`."""
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = (1 - (1 - middle) ** new) / middle
        low, high = (middle, high) if mean > new / 3 else (low, middle)
    return middle


if __name__ == "__main__":
    main()
