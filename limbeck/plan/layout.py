"""How a run is laid out over chips: data (ZeRO), tensor, pipeline, expert and context parallelism, and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..model.config import ModelConfig
from ..types import LimbeckError
from .cluster import Cluster

SCHEDULES = ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev", "gpipe")
RECOMPUTE = ("none", "selective", "half", "full", "v3")


@dataclass(frozen=True)
class Layout:
    """V3's is `Layout(dp=128, pp=16, ep=64, schedule="dualpipe", zero=1, recompute="v3")` on 2,048 chips.

    `ep` chips of the data-parallel ones share the experts. `micro` is sequences a micro-batch; `chunks` model chunks a
    chip of the interleaved schedule; `zero` 0 to 3; `sp` splits what tensor parallelism leaves whole; `overlap` says
    that expert traffic hides behind the other direction's work (DualPipe always does).
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
        return self.dp * self.tp * self.pp * self.cp

    @property
    def experts_split(self) -> int:
        return self.expert_tp or self.tp

    @property
    def stages(self) -> int:
        """Pieces that the model is cut into."""
        return self.pp * (2 if self.schedule == "dualpipev" else self.chunks)

    def owned(self, chip: int) -> list[int]:
        """Stages whose weights a chip of the pipeline holds; DualPipe's hold two stages, one of each direction."""
        if self.schedule in ("dualpipe", "dualpipev"):
            return [chip, self.stages - 1 - chip]
        return list(range(chip, self.stages, self.pp))

    def micro_batches(self, sequences: int) -> int:
        """Micro-batches a pipeline takes in a step of so many sequences."""
        return max(1, sequences // (self.dp * self.micro))

    def tell(self) -> str:
        parts = [
            f"DP{self.dp}",
            *(f"{n.upper()}{getattr(self, n)}" for n in ("tp", "pp", "ep", "cp") if getattr(self, n) > 1),
        ]
        schedule = f", {self.schedule}{f' x{self.chunks}' if self.chunks > 1 else ''}" if self.pp > 1 else ""
        return f"{' '.join(parts)}, ZeRO-{self.zero}, micro-batch {self.micro}, recompute {self.recompute}{schedule}"

    def change(self, **keys: object) -> Layout:
        return replace(self, **keys)


def check(layout: Layout, config: ModelConfig, cluster: Cluster, sequences: int) -> None:
    """Refuse what cannot be laid out, in one sentence that says what is wrong."""
    for wrong, sentence in _faults(layout, config, cluster, sequences):
        if wrong:
            raise LimbeckError(f"layout {layout.tell()}: {sentence}")


def possible(layout: Layout, config: ModelConfig, cluster: Cluster, sequences: int) -> bool:
    return not any(wrong for wrong, _ in _faults(layout, config, cluster, sequences))


def _faults(layout: Layout, config: ModelConfig, cluster: Cluster, sequences: int):
    sizes = {key: getattr(layout, key) for key in ("dp", "tp", "pp", "ep", "cp", "micro", "chunks")}
    low = next((key for key, value in sizes.items() if value < 1), "")
    yield bool(low), f"{low} is less than 1"
    yield (
        layout.schedule not in SCHEDULES,
        f"schedule {layout.schedule} is not known; known are {', '.join(SCHEDULES)}",
    )
    yield (
        layout.recompute not in RECOMPUTE,
        f"recompute {layout.recompute} is not known; known are {', '.join(RECOMPUTE)}",
    )
    yield layout.zero not in (0, 1, 2, 3), f"ZeRO stage {layout.zero} is none of 0 to 3"
    yield layout.chips > cluster.count, f"needs {layout.chips} chips, and {cluster.name} has {cluster.count}"
    yield (
        layout.pp > config.layers + config.predicted,
        f"{layout.pp} stages are more than the {config.layers} layers",
    )
    yield config.heads % layout.tp > 0, f"{config.heads} heads do not divide by TP {layout.tp}"
    experts = config.experts.count if config.experts else 1
    yield layout.ep > 1 and (experts % layout.ep > 0), f"{experts} experts do not divide by EP {layout.ep}"
    room = layout.dp * layout.cp * layout.tp // layout.experts_split
    yield room % layout.ep > 0, f"EP {layout.ep} does not divide the {room} chips that hold copies"
    yield (
        layout.dp * layout.micro > sequences,
        f"{sequences} sequences a step are fewer than DP {layout.dp} x micro-batch {layout.micro}",
    )
    yield (
        layout.schedule.startswith("dualpipe") and layout.pp % 2 > 0,
        f"DualPipe needs an even number of stages, not {layout.pp}",
    )
