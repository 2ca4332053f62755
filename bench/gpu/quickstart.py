"""The whole quickstart on a card, in a process of its own: it takes longer than everything else together."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from .card import Card
from .report import note, promise

RUNS = Path("runs/gpu-quickstart")  # the same command goes on from here


def quickstart_part(card: Card, quick: bool) -> None:
    """Run the quickstart from its first stage to its report, and tell how long each stage took; with
    `--quick` and in a rehearsal the tour, which is over in seconds."""
    recipe = "smoke" if quick or card.rehearsed else "quickstart"
    home = RUNS / card.name
    begin = time.perf_counter()
    command = [sys.executable, "-m", "limbeck", "run", recipe, "--auto", "--device", card.name]
    code = subprocess.run([*command, "--runs", str(home)], check=False).returncode
    note("quickstart", recipe=recipe, seconds=time.perf_counter() - begin, code=code)
    for path in sorted((home / "store").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        note("quickstart", stage=manifest["stage"], seconds=manifest["seconds"])
    promise("quickstart", f"{recipe} ends with its report", code == 0)
