"""Layouts of a run over chips: data (ZeRO), tensor, pipeline, expert and context parallelism."""

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
    """V3's is `Layout(dp=128, pp=16, ep=64, schedule="dualpipe", zero=1, recompute="v3")` on 2,048 chips.

    `ep` of the data-parallel chips share the experts. `micro` is sequences a micro-batch; `chunks` is stages
    a chip of the interleaved schedule; `zero` is 0 to 3; `sp` (sequence parallelism) splits the activations
    that tensor parallelism leaves whole; `overlap` hides expert traffic behind the other direction's
    computing (DualPipe always does).
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
        """Chips that the layout uses."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def experts_split(self) -> int:
        """Tensor parallelism of the experts."""
        return self.expert_tp or self.tp

    @property
    def copies(self) -> int:
        """Chips that hold the same dense weights, and can shard them."""
        return self.dp * self.cp

    @property
    def expert_shards(self) -> int:
        """Parts that the experts of a layer are split into."""
        return self.ep * self.experts_split

    @property
    def expert_copies(self) -> int:
        """Chips that hold the same experts, and can shard them."""
        return max(1, self.copies * self.tp // self.expert_shards)

    @property
    def dual(self) -> bool:
        """True for schedules that overlap a forward with a backward pass."""
        return self.schedule.startswith("dualpipe")

    @property
    def stages(self) -> int:
        """Pieces that the model is cut into."""
        return self.pp * (2 if self.schedule == "dualpipev" else self.chunks)

    def owned(self, chip: int) -> list[int]:
        """Stages whose weights a chip of the pipeline holds; with DualPipe two, one of each direction."""
        if self.dual:
            return [chip, self.stages - 1 - chip]
        return list(range(chip, self.stages, self.pp))

    def micro_batches(self, sequences: int) -> int:
        """Micro-batches of one pipeline in a step of `sequences`."""
        return max(1, sequences // (self.dp * self.micro))

    def tell(self) -> str:
        """The layout in one line."""
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
        """The layout with other values."""
        return replace(self, **keys)


def check(layout: Layout, config: ModelConfig, cluster: Cluster, sequences: int) -> None:
    """Raise LimbeckError, with the reason, for an impossible layout."""
    for reason in _faults(layout, config, cluster, sequences):
        raise LimbeckError(f"layout {layout.tell()}: {reason}")


def possible(layout: Layout, config: ModelConfig, cluster: Cluster, sequences: int) -> bool:
    """True if a model can be trained with a layout on a cluster, memory aside."""
    return not any(_faults(layout, config, cluster, sequences))


def _faults(layout: Layout, config: ModelConfig, cluster: Cluster, sequences: int) -> Iterator[str]:
    """The reasons why a layout is impossible."""
    yield from _invalid_values(layout)
    if layout.chips > cluster.count:
        yield f"needs {layout.chips} chips, and {cluster.name} has {cluster.count}"
    yield from _indivisible(layout, config)
    if layout.dp * layout.micro > sequences:
        yield (f"{sequences} sequences a step are fewer than DP {layout.dp} x micro-batch {layout.micro}")
    if layout.dual and layout.pp % 2 > 0:
        yield f"DualPipe needs an even number of stages, not {layout.pp}"


def _invalid_values(layout: Layout) -> Iterator[str]:
    """Faults of single values."""
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
    """Faults of a model that does not divide over the chips."""
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
