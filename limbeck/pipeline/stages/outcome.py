"""The result of a stage beyond its files: what its manifest says besides the settings."""

from __future__ import annotations

from typing import Any

Outcome = dict[str, Any]  # tokens, flops, notes


def outcome(tokens: int = 0, flops: float = 0, **notes: Any) -> Outcome:
    """Tokens sampled and learned from, FLOPs, and notes for the manifest.

    >>> outcome(3, 1e9, rows=2)
    {'tokens': 3, 'flops': 1000000000.0, 'notes': {'rows': 2}}
    """
    return {"tokens": tokens, "flops": flops, "notes": notes}
