"""Rollouts against transformers' `generate` and vLLM: tokens a second, and share of the processor's FLOPs.

    python -m bench.rollout --size tiny --rows 8 64 256
    python -m bench.rollout --size 135m --rows 8 --threads 2 --against transformers vllm

Groups of eight on prompts of 64 tokens (fewer than eight rows: one group). `decode` leaves the prompts out:
it is (B x (N - 1)) / (time of N tokens - time of one); `share` is what that is of a large square product's
GFLOP/s, taken before and after each turn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from limbeck.model.config import ModelConfig

from . import models
from .sides import Side, alternate, python_of, roofline, tell

NEW = {"tiny": 64, "10m": 64, "135m": 24}
PROMPT = 64  # tokens


def main() -> None:
    """Measure rollouts of all sides and print their speed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(NEW), default="tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--against",
        nargs="*",
        choices=["transformers", "vllm", "vllm-compiled"],
        default=["transformers"],
        help="none: the share of the roofline alone",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = models.make(options.size)
    config, vocabulary = ModelConfig.from_directory(folder), models.SIZES[options.size][0]
    for rows in options.rows:
        group = min(rows, 8)
        settings = {
            "model": str(folder),
            "texts": models.prompts(rows // group, PROMPT, vocabulary),
            "group": group,
            "new": NEW[options.size],
            "gflop": config.flops_per_token(PROMPT + NEW[options.size] // 2) / 1e9,
        }
        sides = [Side("limbeck", "limbeck_rollout.py", sys.executable, settings, options.threads)]
        for peer in options.against:
            home, _, compiled = peer.partition("-")
            sides.append(
                Side(
                    peer,
                    f"{home}_rollout.py",
                    python_of(home),
                    {**settings, "eager": not compiled},
                    options.threads,
                )
            )
        timed, roof = alternate(sides, options.repeats), roofline(options.threads)
        facts = {"size": options.size, "rows": rows, "threads": options.threads}
        tell(
            f"rollouts, {options.size}, {rows} rows, {options.threads} thread(s)",
            timed,
            roof,
            options.json,
            **facts,
        )


if __name__ == "__main__":
    main()
