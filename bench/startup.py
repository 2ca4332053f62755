"""How long one waits before anything happens: the help, the import, the first token of a model.

python -m bench.startup
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from . import models

BIN = Path(sys.executable).parent


def main() -> None:
    """Time every command and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    waits = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "limbeck --help": [str(BIN / "limbeck"), "--help"],
        "limbeck run --help": [str(BIN / "limbeck"), "run", "--help"],
        "import limbeck": [sys.executable, "-c", "import limbeck"],
        "import torch": [sys.executable, "-c", "import torch"],
        "first token, tiny": [
            str(BIN / "limbeck"),
            "ask",
            str(models.make("tiny")),
            "w1 w2 w3",
            "--max-new-tokens",
            "1",
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in waits}
    for _ in range(options.repeats + 1):
        for name, command in waits.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times[name].append(time.perf_counter() - begin)
    print("| what | seconds (quartiles) |\n|---|---|")
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds[1:], n=4)
        print(f"| {name} | {middle:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    main()
