"""What a step holds in a chip's memory: weights, gradients, optimiser, activations, buffers, and what is lost between.

weights     2 bytes each (ZeRO-3: a share, and one layer whole), gradients 2 or 4, master copy and moments 12
activations what the backward pass needs, for each micro-batch in flight: stages ahead of the first in 1F1B
logits      float32, twice; buffers of exchanges; `waste` for what the allocator cannot use
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.config import ModelConfig
from . import cost
from .cluster import Cluster
from .constants import Constants, constants
from .layout import Layout
from .roofline import TUNED, Software
from .stage_cost import spread

MASTER = 12  # bytes a weight of AdamW in mixed precision: float32 copy and two moments
CONTEXT = 1.2e9  # bytes of a CUDA context, NCCL's channels and libraries' workspaces


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest chip. `fits` says whether `total` lies below what the chip has."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    waste: float
    capacity: float

    @property
    def reserved(self) -> float:
        """What the allocator holds: all but the context."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.waste

    @property
    def total(self) -> float:
        return self.reserved + CONTEXT

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    def tell(self) -> str:
        gigabytes = {
            name: getattr(self, name) / 1e9
            for name in ("weights", "gradients", "optimizer", "activations", "logits", "waste")
        }
        parts = ", ".join(f"{name} {value:.1f}" for name, value in gigabytes.items())
        return f"{self.total / 1e9:.1f} of {self.capacity / 1e9:.0f} GB ({parts})"


def fit(
    config: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    seq: int,
    software: Software = TUNED,
    precision: str = "bf16",
    batch: int = 0,
    numbers: Constants | None = None,
) -> Memory:
    """Memory of the fullest chip of a layout. `batch` sequences a step bound the micro-batches in flight; 0 is many."""
    numbers = numbers or constants()
    micro = layout.micro_batches(batch) if batch else 10**6
    ends = {
        0,
        min(1, layout.pp - 1),
        layout.pp // 2,
        layout.pp - 1,
    }  # the fullest: most in flight, or a table of words
    chips = (_chip(config, layout, seq, software, micro, rank) for rank in ends)
    weights, gradients, optimizer, activations, logits = max(chips, key=sum)
    waste = numbers.waste * (activations + logits)
    return Memory(weights, gradients, optimizer, activations, logits, waste, cluster.chip.memory)


def _chip(
    config: ModelConfig, at: Layout, seq: int, software: Software, micro: int, rank: int
) -> tuple[float, ...]:
    works, count = cost.work(config), at.stages
    placed = spread(config, count, software.balanced)
    stages = at.owned(rank)
    layers: dict[cost.Work, int] = {}
    for stage in stages:
        for layer in placed[stage]:
            layers[works[layer]] = layers.get(works[layer], 0) + 1
    table = config.vocab_size * config.hidden_size / at.tp
    ends = (0 in stages) + (count - 1 in stages) * (not config.tied or count > 1)
    dense = sum(n * (w.weights - w.expert_weights) for w, n in layers.items()) / at.tp + ends * table
    experts = sum(n * w.expert_weights for w, n in layers.items()) / (at.ep * at.experts_split)
    copies = at.dp * at.cp
    expert_copies = max(1, copies * at.tp // (at.experts_split * at.ep))
    held, shared = dense + experts, dense / copies + experts / expert_copies
    largest = max(
        (
            (w.weights - w.expert_weights) / at.tp + w.expert_weights / (at.ep * at.experts_split)
            for w in layers
        ),
        default=0.0,
    )
    sharded = (
        at.zero == 3 and at.pp == 1
    )  # in a pipeline weights stay gathered from one micro-batch to the next
    tables = (
        ends * table if sharded else 0.0
    )  # what begins and ends a model stays gathered, and its gradients whole, to the end
    weights = 2 * (shared + 2 * largest + tables if sharded else held)
    again = (
        0 if software.fused or software.gradient_bytes == 2 else 2
    )  # of eager code: in 16 bits, then added up in 32
    gradients = (software.gradient_bytes + again) * (shared if at.zero == 2 or sharded else held) + tables
    optimizer = MASTER * (shared if at.zero else held)
    rows = at.micro * seq / at.cp
    flight = _flight(at, micro, rank)
    kept = rows * sum(n * _kept(w, at, at.recompute, software, seq) for w, n in layers.items())
    twice = (
        rows * max((_kept(w, at, "none", software, seq) for w in layers), default=0.0)
        if at.recompute == "full"
        else 0.0
    )
    if at.tp > 1 and at.recompute == "full" and not software.gathers_twice and not software.hides_tensor:
        twice += rows * 4 * config.hidden_size  # what is gathered, and what is yet to be scattered, as wholes
    activations = flight * kept + twice
    logits = (count - 1 in stages) * rows * config.vocab_size / at.tp * (8 if software.fused else 10)
    return weights, gradients, optimizer, activations, logits


def _flight(at: Layout, micro: int, rank: int) -> float:
    """Micro-batches whose activations a chip holds at once, in shares of all its layers."""
    if at.pp == 1:
        return 1.0
    if at.schedule == "gpipe":
        return micro
    if at.schedule == "interleaved":
        return min(micro, (2 * (at.pp - rank - 1) + (at.chunks - 1) * at.pp + 1) / at.chunks)
    if at.schedule == "zb1p":
        return min(micro, at.pp)
    if at.schedule.startswith("dualpipe"):
        return min(micro, at.pp + 1) / (2 if at.schedule == "dualpipe" else 1)
    return min(micro, at.pp - rank)


def _kept(work: cost.Work, at: Layout, recompute: str, software: Software, seq: int) -> float:
    """Bytes a token that one layer keeps for its backward pass (arXiv 2205.05198, section 4, with what fused code saves)."""
    whole = work.hidden / (at.tp if at.sp else 1)
    if recompute == "full":
        return 2 * whole
    wide = work.kept_wide / (at.tp if at.sp else 1)
    if at.sp and not software.gathers_twice:
        wide = 2 * whole + 2 * work.hidden
    narrow = work.kept_narrow / at.tp
    scores = 0.0
    if software.attention == "unfused":
        narrow += work.hidden / at.tp
        wide += whole  # byte masks of two dropouts
        scores = 0.0 if recompute == "selective" else 5 * work.heads * seq / at.tp
    if recompute == "half":
        return 2 * constants().half * (wide + narrow)
    if recompute == "v3":
        return 2 * (0.5 * wide + 0.4 * narrow)
    return 2 * (wide + narrow) + scores
