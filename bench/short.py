"""The comparisons in their short form: none may have lost a quarter of the ratio that is on record.

    python -m bench.short

A comparison that falls short is run once more before it counts: on a shared machine one run in ten is not like the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# what is compared, against which side, by which number, and how many times as good it was (docs/performance.md)
RECORD: dict[str, tuple[list[str], str, float]] = {
    "GRPO step, fixed lengths": (["bench.grpo", "--repeats", "3"], "trl", 2.7),
    "GRPO step, skewed lengths": (["bench.grpo", "--lengths", "skewed", "--repeats", "3"], "trl", 6.0),
    "rollouts, 8 rows": (["bench.rollout", "--rows", "8", "--repeats", "3"], "transformers", 5.0),
    "update": (["bench.update", "--repeats", "3"], "transformers", 2.1),
}
LOST = 0.75


def main() -> None:
    print("| comparison | on record | now | |\n|---|---|---|---|")
    failed = False
    for name, (command, side, before) in RECORD.items():
        now = ratio(command, side)
        if now < LOST * before:
            now = max(now, ratio(command, side))
        failed |= now < LOST * before
        print(f"| {name} | {before:.1f}x | {now:.1f}x | {'lost' if now < LOST * before else ''} |", flush=True)
    sys.exit(failed)


def ratio(command: list[str], side: str) -> float:
    """How many times as long as Limbeck the other side took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "said.jsonl"
        subprocess.run([sys.executable, "-m", *command, "--size", "tiny", "--json", str(out)], check=True, capture_output=True, text=True)
        return json.loads(out.read_text().splitlines()[-1])["ratios"][side]


if __name__ == "__main__":
    main()
