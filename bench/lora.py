"""One policy-gradient update of LoRA's adapters against one of all weights: seconds, memory, checkpoint.

    python -m bench.lora --size 135m
    python -m bench.lora --size tiny --rank 4 --reference

With `--reference`, both sides hold a reference model for a KL term. Peak memory is that of a whole process,
torch included.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import models
from .sides import Side, alternate, roofline, tell
from .update import WORK


def main() -> None:
    """Compare both ways of learning and print their times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(WORK), default="135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--reference", action="store_true", help="hold a reference model as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts, group, new, width = WORK[options.size]
    settings = {
        "model": str(models.make(options.size)),
        "prompts": prompts,
        "lengths": [new] * group,
        "new": new,
        "width": width,
        "batch_tokens": 4096,
        "reference": options.reference,
    }
    sides = []
    for name, rank in ((f"LoRA r{options.rank}", options.rank), ("all weights", None)):
        work = {**settings, "rank": rank}
        sides.append(Side(name, "limbeck_lora.py", sys.executable, work, options.threads))
    timed = alternate(sides, options.repeats)
    title = f"update, {options.size}, {options.threads} thread(s)"
    tell(title, timed, roofline(options.threads), options.json, size=options.size, rank=options.rank)


if __name__ == "__main__":
    main()
