"""The planner's own numbers, each with where it comes from: physics, a specification, a fit, or a guess."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .chips import LOADER

FILE = Path(__file__).with_name("constants.yaml")
KINDS = ("physics", "spec", "fitted", "guessed")
MOST = 12  # fitted constants


@dataclass(frozen=True)
class Constants:
    """Values by name; constants.yaml says what each is. `Constants(**{...})` in a calibration."""

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
    """Name -> value, kind (one of KINDS), what it is, source."""
    return yaml.load(FILE.read_text(encoding="utf-8"), LOADER)


@cache
def constants() -> Constants:
    told = provenance()
    return Constants(**{field.name: float(told[field.name]["value"]) for field in fields(Constants)})
