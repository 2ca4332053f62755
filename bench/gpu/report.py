"""Numbers and promises of the parts, the time that each may take, and the JSON file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

RESULTS: dict[str, list[dict]] = {}
_ends = float("inf")  # when the time of the part that runs is over


def note(part: str, **numbers: object) -> None:
    """Print one line of numbers and keep it for the JSON file."""
    RESULTS.setdefault(part, []).append(numbers)
    words = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in numbers.items())
    print(f"[{part}]", *words, flush=True)


def promise(part: str, what: str, kept: bool) -> None:
    """Print whether a promise is kept, and keep it."""
    note(part, promise=what, kept=bool(kept))


def broken() -> list[str]:
    """Return the promises that were not kept."""
    return [
        f"{part}: {line['promise']}"
        for part, lines in RESULTS.items()
        for line in lines
        if line.get("kept") is False
    ]


def begin(seconds: float) -> None:
    """Begin a part that may take so many seconds."""
    global _ends
    _ends = time.monotonic() + seconds


def left() -> float:
    """Return the seconds that the part may still take, at least 0."""
    return max(0.0, _ends - time.monotonic())


def spare(part: str, what: str, seconds: float = 0.0) -> bool:
    """Return True if the part has so many seconds left for its next measurement, `what`; else say that it is
    left out."""
    if left() > seconds:
        return True
    note(part, left_out=what, because="the part's time is over")
    return False


def save(path: Path) -> None:
    """Write all numbers so far as JSON, in the place of what was there."""
    written = path.with_name(path.name + ".new")
    written.write_text(json.dumps(RESULTS, indent=1) + "\n", encoding="utf-8")
    os.replace(written, path)
