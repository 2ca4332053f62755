"""A whole GRPO step on one core and on two: rollout, rewards, update, new weights.

    python -m bench.cores --size tiny 10m 135m

One side has one thread, the other two; they take turns.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .grpo import WORK, work
from .sides import Side, alternate, roofline, tell


def main() -> None:
    """Compare training with several numbers of cores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(WORK), nargs="+", default=list(WORK))
    parser.add_argument("--lengths", choices=["fixed", "skewed"], default="fixed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for size in options.size:
        settings = work(size, options.lengths)
        sides = [
            Side(f"{threads} thread(s)", "limbeck_grpo.py", sys.executable, settings, threads)
            for threads in (2, 1)
        ]
        timed = alternate(sides, options.repeats)
        title = f"GRPO step on one core and two, {size}, {options.lengths} lengths"
        tell(title, timed, roofline(2), options.json, size=size, lengths=options.lengths)


if __name__ == "__main__":
    main()
