"""SFT against TRL's SFTTrainer, packed and not, in tokens learned a second.

    python -m bench.sft --size tiny
    python -m bench.sft --size 10m --threads 2

Documents of 8 to 256 tokens, most of them short, in batches of 32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from . import models
from .sides import Side, alternate, python_of, roofline, tell

BATCH, LONGEST, DOCUMENTS = {"tiny": 32, "10m": 32, "135m": 8}, 256, 640


def main() -> None:
    """Compare both sides and print their times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(BATCH), default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lengths = np.random.default_rng(0).exponential(80, DOCUMENTS).clip(8, LONGEST).astype(int)
    vocabulary = models.SIZES[options.size][0]
    settings = {
        "model": str(models.make(options.size)),
        "batch": BATCH[options.size],
        "batch_tokens": 4096,
        "longest": LONGEST,
        "mean": float(lengths.mean()),
        "texts": [models.prompts(1, n, vocabulary, i)[0] for i, n in enumerate(lengths)],
    }
    sides = [Side("limbeck", "limbeck_sft.py", sys.executable, settings, options.threads)]
    for packed in (False, True):
        name = "trl, packed" if packed else "trl"
        sides.append(
            Side(name, "trl_sft.py", python_of("trl"), {**settings, "packed": packed}, options.threads)
        )
    timed = alternate(sides, options.repeats)
    facts = {"size": options.size, "threads": options.threads}
    tell(
        f"SFT, {options.size}, {options.threads} thread(s)",
        timed,
        roofline(options.threads),
        options.json,
        **facts,
    )
    ours, *theirs = (side.medians["tokens_per_second"] for side in timed.values())
    print(f"\ntokens a second: {ours / max(theirs):.2f}x of TRL's best setting")


if __name__ == "__main__":
    main()
