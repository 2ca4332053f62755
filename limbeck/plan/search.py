"""The best layout of a model on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.config import ModelConfig
from .fabric import Cluster
from .layout import Layout
from .memory import Memory
from .roofline import TUNED, Software
from .step import Step


@dataclass(frozen=True)
class Choice:
    """A layout with what it takes, and why it is not better."""

    layout: Layout
    step: Step
    memory: Memory

    def tell(self) -> str:
        return f"{self.layout.tell()}: {self.step.seconds:.3g} s a step, {self.step.binds}; {self.memory.tell()}"


def best(
    config: ModelConfig, cluster: Cluster, batch: int, seq: int, precision: str = "bf16", software: Software = TUNED, top: int = 5
) -> list[Choice]:
    """The `top` best layouts, best first; one sentence where none fits."""
    raise NotImplementedError
