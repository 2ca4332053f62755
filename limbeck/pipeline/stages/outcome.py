"""The return value of a stage's `run`: costs and notes for the manifest, besides the files that it writes."""

from __future__ import annotations

from typing import Any

Outcome = dict[str, Any]  # tokens, flops, notes


def outcome(tokens: int = 0, flops: float = 0, **notes: Any) -> Outcome:
    """Return a stage's outcome: `tokens` sampled and trained on, `flops`, and `notes` for the manifest.

    >>> outcome(3, 1e9, rows=2)
    {'tokens': 3, 'flops': 1000000000.0, 'notes': {'rows': 2}}
    """
    return {"tokens": tokens, "flops": flops, "notes": notes}
