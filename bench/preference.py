"""One DPO step against TRL's DPOTrainer, the reference's log-probabilities known on both sides.

    python -m bench.preference --size tiny
    python -m bench.preference --size 10m --threads 2 --json bench.jsonl

Pairs of responses of 8 to 128 tokens, most of them short, to prompts of 64. TRL's side is its fastest
setting: the reference is asked before training (`precompute_ref_log_probs`), as it is here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from . import models
from .sides import Side, alternate, python_of, roofline, tell

PAIRS, PROMPT, LONGEST, BATCHES = {"tiny": 16, "10m": 16, "135m": 4}, 64, 128, 8


def main() -> None:
    """Compare both sides and print their times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(PAIRS), default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {
        "model": str(models.make(options.size)),
        "pairs": PAIRS[options.size],
        "batch_tokens": 8192,
        **texts(options.size),
    }
    sides = [
        Side("limbeck", "limbeck_preference.py", sys.executable, settings, options.threads),
        Side("trl", "trl_preference.py", python_of("trl"), settings, options.threads),
    ]
    timed = alternate(sides, options.repeats)
    facts = {"size": options.size, "threads": options.threads}
    tell(
        f"DPO step, {options.size}, {options.threads} thread(s)",
        timed,
        roofline(options.threads),
        options.json,
        **facts,
    )


def texts(size: str) -> dict[str, list[str]]:
    """Prompts, and two responses to each, their lengths drawn once."""
    count, vocabulary = BATCHES * PAIRS[size], models.SIZES[size][0]
    lengths = np.random.default_rng(0).exponential(40, (2, count)).clip(8, LONGEST).astype(int)
    said = [
        [models.prompts(1, n, vocabulary, 1000 * side + i)[0] for i, n in enumerate(row)]
        for side, row in enumerate(lengths)
    ]
    return {"texts": models.prompts(count, PROMPT, vocabulary), "chosen": said[0], "rejected": said[1]}


if __name__ == "__main__":
    main()
