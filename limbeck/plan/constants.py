"""The planner's own numbers, each with its origin: physics, a specification, a fit, or a guess."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .chips import LOADER

FILE = Path(__file__).with_name("constants.yaml")


@dataclass(frozen=True)
class Constants:
    """The planner's constants by name; constants.yaml has the description and the source of each."""

    gemm_ampere: float
    gemm_hopper: float
    depth: float
    eager: float
    passes: float
    launch: float
    links: float
    cards: float
    efa: float
    hidden: float
    jitter: float
    memory: float
    flash_ampere: float
    flash_hopper: float
    flash3_hopper: float
    gemm_other: float
    gemm_fp8: float
    waste: float
    power: float
    prefetched: float
    half: float
    practice: float
    goodput: float


@cache
def provenance() -> dict[str, dict[str, Any]]:
    """Return the entries of constants.yaml: name -> value, kind, description and source.

    The kind is "physics", "spec", "fitted" or "guessed".
    """
    return yaml.load(FILE.read_text(encoding="utf-8"), LOADER)


@cache
def constants() -> Constants:
    """Return the values of constants.yaml as `Constants`."""
    entries = provenance()
    values = {}
    for field in fields(Constants):
        values[field.name] = float(entries[field.name]["value"])
    return Constants(**values)
