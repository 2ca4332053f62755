"""One GKD step against TRL's GKDTrainer: student and teacher of one shape, generalised JSD over all tokens.

    python -m bench.distill --size tiny                      # on the student's own responses
    python -m bench.distill --size 10m --rows --threads 2    # on given responses

Both sides load the same random weights and read the same prompts, and take turns; responses are all at the
limit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import models
from .sides import Side, alternate, python_of, roofline, tell

# prompts, new tokens, prompt tokens
WORK = {"tiny": (32, 64, 64), "10m": (32, 64, 64), "135m": (8, 32, 64)}
BATCHES = 4


def main() -> None:
    """Compare both sides and print their times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(WORK), default="tiny")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    prompts, new, width = WORK[options.size]
    vocabulary = models.SIZES[options.size][0]
    settings = {
        "model": str(models.make(options.size)),
        "teacher": str(models.make(options.size, 1)),
        "prompts": prompts,
        "new": new,
        "rows": options.rows,
        "beta": 0.5,
        "batch_tokens": 8192,
        "texts": models.prompts(BATCHES * prompts, width, vocabulary),
        "responses": models.prompts(BATCHES * prompts, new, vocabulary, 1),
    }
    sides = [
        Side("limbeck", "limbeck_distill.py", sys.executable, settings, options.threads),
        Side("trl", "trl_distill.py", python_of("trl"), settings, options.threads),
    ]
    timed = alternate(sides, options.repeats)
    way = "on rows" if options.rows else "on-policy"
    facts = {"size": options.size, "way": way, "threads": options.threads}
    tell(
        f"GKD step, {options.size}, {way}, {options.threads} thread(s)",
        timed,
        roofline(options.threads),
        options.json,
        **facts,
    )


if __name__ == "__main__":
    main()
