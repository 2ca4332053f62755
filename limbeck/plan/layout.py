"""Layouts of a run over chips: data (ZeRO), tensor, pipeline, expert and context parallelism.

A layout says how a training run is divided over chips. A pipeline is a group of chips that hold one copy of
the model's layers; its stages are the consecutive pieces that the layers are cut into. A rank is a chip's
position in its pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..model.config import ModelConfig
from ..types import LimbeckError
from .cluster import Cluster

SCHEDULES = ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev", "gpipe")
RECOMPUTE = ("none", "selective", "half", "full", "v3")


@dataclass(frozen=True)
class Layout:
    """How a training run is divided over chips.

    `dp`, `tp`, `pp`, `ep` and `cp` are the degrees of data, tensor, pipeline, expert and context parallelism;
    each expert group is `ep` of the data-parallel chips. `micro` is the sequences of a micro-batch; `chunks`
    the stages a chip of the interleaved schedule; `zero` the stage of ZeRO, 0 to 3. `sp` (sequence
    parallelism) splits the activations that tensor parallelism leaves whole. `overlap` hides expert traffic
    behind the computing of a pass in the other direction (DualPipe always does). DeepSeek-V3's is
    `Layout(dp=128, pp=16, ep=64, schedule="dualpipe", zero=1, recompute="v3")` on 2,048 chips.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    zero: int = 1
    micro: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: str = "none"
    sp: bool = True
    overlap: bool = False
    expert_tp: int = 0  # tensor parallelism of experts; 0: the same as of the rest

    @property
    def chips(self) -> int:
        """The number of chips that the layout uses."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def experts_split(self) -> int:
        """The degree of tensor parallelism of the experts."""
        return self.expert_tp or self.tp

    @property
    def copies(self) -> int:
        """The number of chips that hold the same dense weights; ZeRO can shard the weights over them."""
        return self.dp * self.cp

    @property
    def expert_shards(self) -> int:
        """The number of parts that the experts of a layer are split into."""
        return self.ep * self.experts_split

    @property
    def expert_copies(self) -> int:
        """The number of chips that hold the same expert weights; ZeRO can shard the weights over them."""
        return max(1, self.copies * self.tp // self.expert_shards)

    @property
    def dual(self) -> bool:
        """True if the schedule overlaps a forward pass with a backward pass (DualPipe, DualPipeV)."""
        return self.schedule.startswith("dualpipe")

    @property
    def stages(self) -> int:
        """The number of pieces that the model's layers are cut into."""
        return self.pp * (2 if self.schedule == "dualpipev" else self.chunks)

    def owned(self, chip: int) -> list[int]:
        """Return the stages whose weights the chip of rank `chip` holds.

        With DualPipe they are two, one for each direction of the pipeline.
        """
        if self.dual:
            return [chip, self.stages - 1 - chip]
        return list(range(chip, self.stages, self.pp))

    def micro_batches(self, sequences: int) -> int:
        """Return the micro-batches that one pipeline processes in a step of `sequences` sequences."""
        return max(1, sequences // (self.dp * self.micro))

    def tell(self) -> str:
        """Return a description of the layout in one line."""
        parts = [f"DP{self.dp}"]
        for name in ("tp", "pp", "ep", "cp"):
            size = getattr(self, name)
            if size > 1:
                parts.append(f"{name.upper()}{size}")
        text = f"{' '.join(parts)}, ZeRO-{self.zero}, micro-batch {self.micro}, recompute {self.recompute}"
        if self.pp > 1:
            text += f", {self.schedule}"
            if self.chunks > 1:
                text += f" x{self.chunks}"
        return text

    def change(self, **keys: object) -> Layout:
        """Return the layout with other values of its fields."""
        return replace(self, **keys)


def check(layout: Layout, config: ModelConfig, cluster: Cluster, sequences: int) -> None:
    """Raise LimbeckError, which states the reason, if the layout is impossible.

    `sequences` is the sequences of a step. Memory is not checked.
    """
    for reason in _faults(layout, config, cluster, sequences):
        raise LimbeckError(f"layout {layout.tell()}: {reason}")


def possible(layout: Layout, config: ModelConfig, cluster: Cluster, sequences: int) -> bool:
    """Return True if the layout is possible for this model on this cluster, apart from memory.

    `sequences` is the sequences of a step.
    """
    return not any(_faults(layout, config, cluster, sequences))


def _faults(layout: Layout, config: ModelConfig, cluster: Cluster, sequences: int) -> Iterator[str]:
    """Yield the reasons why the layout is impossible; nothing if it is possible."""
    yield from _invalid_values(layout)
    if layout.chips > cluster.count:
        yield f"needs {layout.chips} chips, and {cluster.name} has {cluster.count}"
    yield from _indivisible(layout, config)
    if layout.dp * layout.micro > sequences:
        yield (f"{sequences} sequences a step are fewer than DP {layout.dp} x micro-batch {layout.micro}")
    if layout.dual and layout.pp % 2 > 0:
        yield f"DualPipe needs an even number of stages, not {layout.pp}"


def _invalid_values(layout: Layout) -> Iterator[str]:
    """Yield a reason for each single value of the layout that is out of range or unknown."""
    for name in ("dp", "tp", "pp", "ep", "cp", "micro", "chunks"):
        if getattr(layout, name) < 1:
            yield f"{name} is less than 1"
            return
    if layout.schedule not in SCHEDULES:
        yield f"schedule {layout.schedule} is not known; known are {', '.join(SCHEDULES)}"
    if layout.recompute not in RECOMPUTE:
        yield f"recompute {layout.recompute} is not known; known are {', '.join(RECOMPUTE)}"
    if layout.zero not in (0, 1, 2, 3):
        yield f"ZeRO stage {layout.zero} is none of 0 to 3"


def _indivisible(layout: Layout, config: ModelConfig) -> Iterator[str]:
    """Yield a reason for each part of the model that does not divide evenly over the chips."""
    if layout.pp > config.layers + config.predicted:
        yield f"{layout.pp} stages are more than the {config.layers} layers"
    if config.heads % layout.tp > 0:
        yield f"{config.heads} heads do not divide by TP {layout.tp}"
    experts = config.experts.count if config.experts else 1
    if layout.ep > 1 and experts % layout.ep > 0:
        yield f"{experts} experts do not divide by EP {layout.ep}"
    room = layout.copies * layout.tp // layout.experts_split
    if room % layout.ep > 0:
        yield f"EP {layout.ep} does not divide the {room} chips that hold copies"
