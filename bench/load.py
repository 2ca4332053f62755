"""A checkpoint read and written, against transformers.

python -m bench.load --size 135m
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import models
from .sides import Side, alternate, python_of, roofline, tell


def main() -> None:
    """Compare the times in which both sides load a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(models.SIZES), default="135m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {"model": str(models.make(options.size))}
    sides = [
        Side("limbeck", "limbeck_load.py", sys.executable, settings, 1),
        Side("transformers", "transformers_load.py", python_of("transformers"), settings, 1),
    ]
    tell(
        f"load and save, {options.size}",
        alternate(sides, options.repeats),
        roofline(1),
        options.json,
        size=options.size,
    )


if __name__ == "__main__":
    main()
