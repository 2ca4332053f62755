"""Memory of a training step on one chip: weights, gradients, optimiser, activations, logits, waste.

weights      2 bytes each (ZeRO-3: a share of them, and one layer whole)
gradients    2 or 4 bytes a weight; the optimiser's float32 copy and moments 12
activations  inputs of the backward pass, for each micro-batch in flight
logits       float32, twice
waste        fragments that the allocator cannot use

A micro-batch is in flight on a chip between its forward and its backward pass there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from ..model.config import ModelConfig
from . import cost
from .cluster import Cluster
from .constants import Constants, constants
from .layout import Layout
from .roofline import TUNED, Software
from .stage_cost import spread

MASTER = 12  # bytes a weight of AdamW in mixed precision: float32 copy and two moments
CONTEXT = 1.2e9  # bytes of a CUDA context, NCCL's channels and libraries' workspaces
UNBOUNDED = 10**6  # micro-batches a step, where the batch is not given
LOGIT_BYTES = 8  # a logit: float32, twice
EAGER_LOGIT_BYTES = 10  # a logit of eager code: 16 bits in addition


@dataclass(frozen=True)
class Memory:
    """The memory in bytes on the chip that needs the most, by its parts.

    `capacity` is the bytes that a chip has.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    waste: float
    capacity: float

    @property
    def reserved(self) -> float:
        """Bytes that the allocator reserves: all parts without the CUDA context."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.waste

    @property
    def total(self) -> float:
        """Bytes in all, with the CUDA context and the libraries' workspaces."""
        return self.reserved + CONTEXT

    @property
    def fits(self) -> bool:
        """True if the total is within the chip's memory."""
        return self.total <= self.capacity

    def tell(self) -> str:
        """Return the total and its parts in GB, in one line."""
        parts = []
        for name in ("weights", "gradients", "optimizer", "activations", "logits", "waste"):
            parts.append(f"{name} {getattr(self, name) / 1e9:.1f}")
        return f"{self.total / 1e9:.1f} of {self.capacity / 1e9:.0f} GB ({', '.join(parts)})"


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
    """Return the memory of the chip that needs the most.

    `batch` is the sequences of a step, which limit the micro-batches in flight; 0 means no limit. `numbers`
    are the planner's constants, by default those of constants.yaml.
    """
    numbers = numbers or constants()
    micro = layout.micro_batches(batch) if batch else UNBOUNDED
    last = layout.pp - 1
    # the fullest has most micro-batches in flight, or an embedding
    ranks = {0, min(1, last), layout.pp // 2, last}
    chips = [_Chip(config, layout, seq, software, micro, rank).parts() for rank in ranks]
    weights, gradients, optimizer, activations, logits = max(chips, key=sum)
    waste = numbers.waste * (activations + logits)
    return Memory(weights, gradients, optimizer, activations, logits, waste, cluster.chip.memory)


@dataclass(frozen=True)
class _Chip:
    """One chip of a pipeline, at position `rank`, with at most `micro` micro-batches in flight."""

    config: ModelConfig
    layout: Layout
    seq: int
    software: Software
    micro: int
    rank: int

    def parts(self) -> tuple[float, ...]:
        """Return the bytes of weights, gradients, optimiser, activations and logits, in this order."""
        at = self.layout
        if self.sharded:
            # embeddings stay gathered, and their gradients whole
            weights = 2 * (self.shard + 2 * self.largest_layer + self.embeddings)
            gradients = self.gradient_bytes * self.shard + self.embeddings
        else:
            weights = 2 * self.whole
            gradients = self.gradient_bytes * (self.shard if at.zero == 2 else self.whole)
        optimizer = MASTER * (self.shard if at.zero else self.whole)
        return weights, gradients, optimizer, self.activations(), self.logits()

    @cached_property
    def layers(self) -> Counter[cost.Work]:
        """The layers on this chip, with the number of times that equal ones occur."""
        works = cost.work(self.config)
        placed = spread(self.config, self.layout.stages, self.software.balanced)
        layers: Counter[cost.Work] = Counter()
        for stage in self.layout.owned(self.rank):
            layers.update(works[layer] for layer in placed[stage])
        return layers

    @cached_property
    def last(self) -> bool:
        """True if the chip holds the last stage of the pipeline."""
        return self.layout.stages - 1 in self.layout.owned(self.rank)

    @cached_property
    def embeddings(self) -> float:
        """The number of weights of the embedding and of the output matrix on this chip."""
        table = self.config.vocab_size * self.config.hidden_size / self.layout.tp
        own_head = not self.config.tied or self.layout.stages > 1
        count = 0 in self.layout.owned(self.rank)
        count += self.last and own_head
        return count * table

    @cached_property
    def dense(self) -> float:
        """The number of weights on this chip, without those of experts."""
        weights = sum(n * (work.weights - work.expert_weights) for work, n in self.layers.items())
        return weights / self.layout.tp + self.embeddings

    @cached_property
    def experts(self) -> float:
        """The number of weights of experts on this chip."""
        weights = sum(n * work.expert_weights for work, n in self.layers.items())
        return weights / self.layout.expert_shards

    @property
    def whole(self) -> float:
        """The number of all weights on this chip before ZeRO shards them."""
        return self.dense + self.experts

    @property
    def shard(self) -> float:
        """The number of weights that remain on this chip if they are sharded over the data-parallel chips."""
        return self.dense / self.layout.copies + self.experts / self.layout.expert_copies

    @property
    def largest_layer(self) -> float:
        """The number of weights of the largest layer, divided only by tensor and expert parallelism."""
        at = self.layout
        largest = 0.0
        for work in self.layers:
            dense = (work.weights - work.expert_weights) / at.tp
            experts = work.expert_weights / at.expert_shards
            largest = max(largest, dense + experts)
        return largest

    @property
    def sharded(self) -> bool:
        """True if ZeRO-3 shards the weights; in a pipeline they stay gathered between micro-batches."""
        return self.layout.zero == 3 and self.layout.pp == 1

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients for each weight.

        Eager code keeps 16-bit gradients beside the float32 sums.
        """
        software = self.software
        if software.fused or software.gradient_bytes == 2:
            return software.gradient_bytes
        return software.gradient_bytes + 2

    @property
    def rows(self) -> float:
        """The tokens of a micro-batch on this chip."""
        return self.layout.micro * self.seq / self.layout.cp

    def activations(self) -> float:
        """Return the bytes saved for the backward pass by all micro-batches in flight.

        With full recomputation, the activations of the one layer that is being recomputed are added.
        """
        at = self.layout
        saved = sum(n * self._saved(work, at.recompute) for work, n in self.layers.items())
        again = 0.0
        if at.recompute == "full":
            again = self.rows * max((self._saved(work, "none") for work in self.layers), default=0.0)
            if at.tp > 1 and not self.software.gathers_twice and not self.software.hides_tensor:
                again += self.rows * 4 * self.config.hidden_size  # gathered inputs, and unscattered outputs
        return self.in_flight() * (self.rows * saved) + again

    def logits(self) -> float:
        """Return the bytes of the logits; 0 unless the chip holds the last stage."""
        if not self.last:
            return 0.0
        width = LOGIT_BYTES if self.software.fused else EAGER_LOGIT_BYTES
        return self.rows * self.config.vocab_size / self.layout.tp * width

    def in_flight(self) -> float:
        """Return how many micro-batches' activations of all of the chip's layers it holds at once.

        The number may be fractional, as a micro-batch may have passed only some of the chip's stages.
        """
        at = self.layout
        behind = at.pp - self.rank  # stages from this one to the last
        if at.pp == 1:
            return 1.0
        if at.schedule == "gpipe":
            return self.micro
        if at.schedule == "interleaved":
            pieces = 2 * (behind - 1) + (at.chunks - 1) * at.pp + 1
            return min(self.micro, pieces / at.chunks)
        if at.schedule == "zb1p":
            return min(self.micro, at.pp)
        if at.dual:
            return min(self.micro, at.pp + 1) / (2 if at.schedule == "dualpipe" else 1)
        return min(self.micro, behind)

    def _saved(self, work: cost.Work, recompute: str) -> float:
        """Return the bytes a token that a layer saves for its backward pass (arXiv 2205.05198, section 4).

        `recompute` is one of the modes `layout.RECOMPUTE`.
        """
        at = self.layout
        whole = work.hidden / (at.tp if at.sp else 1)
        if recompute == "full":
            return 2 * whole
        wide = work.saved_wide / (at.tp if at.sp else 1)
        if at.sp and not self.software.gathers_twice:
            wide = 2 * whole + 2 * work.hidden
        narrow = work.saved_narrow / at.tp
        scores = 0.0
        if self.software.attention == "unfused":
            narrow += work.hidden / at.tp
            wide += whole  # byte masks of two dropouts
            if recompute != "selective":
                scores = 5 * work.heads * self.seq / at.tp
        if recompute == "half":
            return 2 * constants().half * (wide + narrow)
        if recompute == "v3":
            return 2 * (0.5 * wide + 0.4 * narrow)
        return 2 * (wide + narrow) + scores
