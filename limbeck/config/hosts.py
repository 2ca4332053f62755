"""The settings of `--hosts FILE`: the processes that sample and grade for the stages of a run.

This module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ..types import LimbeckError
from .load import read_yaml
from .parts import Settings
from .validate import explain


class Seats(Settings):
    """The seats of a stage: processes that sample and grade."""

    count: int = Field(1, ge=1, le=256, description="processes of each worker; changes no result")
    threads: int = Field(1, ge=1, description="threads of each process; may change how results are rounded")


class Hosts(Settings):
    """What the stages of a run sample on. Nothing of it is part of a stage's key."""

    kind: Literal["local"] = Field("local", description="`local`: processes on this machine")
    seats: Seats = Field(Seats(), description="the processes")
    shard: int = Field(
        64,
        ge=1,
        description="completions that a process samples at once, whole groups; may change how results are "
        "rounded",
    )
    patience: float = Field(
        120,
        gt=0,
        description="seconds after which a process that has not started, or gives no sign of life, is "
        "replaced by another",
    )
    restarts: int = Field(3, ge=0, description="deaths of processes that a stage survives")

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that may change how results are rounded, for manifests."""
        return {"kind": self.kind, "shard": self.shard, "threads": self.seats.threads}


def load_hosts(path: Path) -> Hosts:
    """Read the file of `--hosts`. Raises LimbeckError with one sentence about its first mistake."""
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise LimbeckError(f"{path}: no such file; docs/how-to/several-machines.md shows one") from None
    if not isinstance(tree, dict):
        raise LimbeckError(f"{path}: hosts are a mapping with keys such as kind and seats")
    try:
        return Hosts.model_validate(tree)
    except ValidationError as error:
        raise LimbeckError(f"{path}: {explain(error, Hosts)}") from None
