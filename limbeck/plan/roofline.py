"""How long a chip takes for one layer: matrix products, attention, copying, and the host that starts them.

product    2 rows k n / (peak x reached x fill),  or its bytes / bandwidth if that is longer
fill       k/(k + depth) x waves/(waves + 1/2)    short inner lengths and a last, half empty wave of tiles
attention  FLOPs over the keys seen / (peak x reached); unfused: whole square, and its scores through memory
the rest   bytes / bandwidth;  everything at least as long as the host needs to start it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from .chips import Chip
from .constants import Constants, constants
from .cost import Matmul, Work

TILE = 128 * 256  # values that one multiprocessor makes at a time (cuBLAS, CUTLASS)
UNITS = {
    "a100": 108,
    "h20": 78,
    "4090": 128,
    "v100": 80,
    "b200": 148,
}  # multiprocessors; 132 on Hopper's others
FORWARD_OPERATIONS, EXPERT_OPERATIONS, SUM_OPERATIONS = (
    20,
    12,
    8,
)  # started by the host in a layer: norms, products, sums
FULL, WATTS = (
    {"hopper": 989, "blackwell": 2250},
    700,
)  # TFLOPS of a whole chip, and the power at which it was fitted
CAST_BYTES = 6  # an operand of an FP8 product: read, its largest value found, written in eight bits, and once transposed
SCORE_BYTES = 13  # a score's way through memory forward, unfused: written, soft-maxed, dropped out, read (fp16, byte mask)


@dataclass(frozen=True)
class Software:
    """How well a training system is made. The default is a tuned one (Megatron-Core, torchtitan compiled, HAI-LLM);
    `EAGER` is plain PyTorch, and `EARLY` is of before FlashAttention (2022).

    `attention` is "flash3", "flash2" or "unfused"; `gradient_bytes` a weight when gradients are exchanged.
    """

    fused: bool = True
    attention: str = "flash3"
    gradient_bytes: int = 4
    reduce: str = "nccl"
    hides_tensor: bool = False
    bucket: float = 400e6  # bytes of gradients exchanged at a time
    zigzag: bool = True  # context parallelism gives each chip an early and a late piece of a sequence
    prefetches: bool = True  # gradients and weights travel while others are computed
    sums_late: bool = (
        False  # under ZeRO-3 weights alone do: what is to be summed travels when a layer is done
    )
    rings: int = 0  # rings of an exchange between nodes; 0: as many as there are cards
    gathers_twice: bool = (
        True  # what sequence parallelism gathered is let go, and gathered again for the gradients
    )
    balanced: bool = False  # layers given to stages by what they cost, the head counted

    @property
    def name(self) -> str:
        return (
            "tuned"
            if self.fused and self.attention == "flash3"
            else "early"
            if self.attention == "unfused"
            else "eager"
        )


TUNED = Software()
EAGER = Software(fused=False, attention="flash2", bucket=50e6, balanced=True, prefetches=False)
EARLY = Software(attention="unfused")
FSDP = Software(fused=False, attention="flash2", gradient_bytes=2)  # PyTorch's, with prefetching
HAI = Software(reduce="hfreduce", attention="flash2")  # HAI-LLM on Fire-Flyer 2
TITAN = Software(attention="flash2", gathers_twice=False)  # compiled
DEEPSPEED = Software(
    attention="unfused", gradient_bytes=2, rings=1, sums_late=True
)  # ZeRO-3 of 2021: what arXiv 2104.04473 measured is one ring


@dataclass(frozen=True)
class Split:
    """What one chip has of a layer: `rows` tokens of sequences of `seq`, a `tp`-th of matrices, of `ep` x its tokens
    an `ep`-th of the experts."""

    rows: float
    seq: float
    tp: int = 1
    sp: bool = True
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1


@dataclass(frozen=True)
class Parts:
    """Seconds of one layer on one chip, without communication."""

    forward: float
    backward: float  # gradients of inputs
    weight: float  # gradients of weights
    core: float  # attention's scores and mixing, forward
    light: float  # norms, activations and small up-projections, forward: what V3 computes twice


@dataclass(frozen=True)
class Roofline:
    """`Roofline(find("h100"), "bf16").matmul(4096, 7168, 18432)` is 1.6 ms."""

    chip: Chip
    precision: str = "bf16"
    software: Software = TUNED
    numbers: Constants = field(default_factory=constants)

    @cached_property
    def peak(self) -> float:
        """FLOP/s that a large product reaches."""
        c, chip = self.numbers, self.chip
        rate = chip.rate(self.precision)
        if "gemm" in chip.figures and self.precision != "fp8":
            return 1e12 * chip.figure("gemm")
        if chip.generation in (
            "hopper",
            "blackwell",
        ):  # bound by power: an H20 has power to spare, a 500 W board less
            full = 1e12 * FULL[chip.generation]
            if self.precision == "fp8":
                reached = 2 * full * c.gemm_fp8
            else:
                reached = full * c.gemm_hopper
            return min(rate * c.gemm_other, reached * (chip.figures.get("watts", WATTS) / WATTS) ** c.power)
        return rate * (c.gemm_ampere if chip.generation in ("ampere", "volta") else c.gemm_other)

    @cached_property
    def flash(self) -> float:
        """FLOP/s of the attention kernel; it works in 16 bits whatever the matrices are in."""
        c, chip = self.numbers, self.chip
        rate = chip.rate("bf16" if "bf16" in chip.figures else "fp16")
        if chip.generation not in FULL:
            return rate * c.flash_ampere
        full = 1e12 * FULL[chip.generation]
        return min(
            rate * c.flash_ampere,
            full * (c.flash3_hopper if self.software.attention == "flash3" else c.flash_hopper),
        )

    @cached_property
    def memory(self) -> float:
        return self.chip.bandwidth * self.numbers.memory

    @cached_property
    def units(self) -> int:
        name = self.chip.name
        return next((units for key, units in UNITS.items() if name.startswith(key)), 132)

    def matmul(
        self, rows: float, inner: float, outputs: float, many: float = 1.0, written: float = 2.0
    ) -> float:
        """Seconds of `many` products of rows x inner with inner x outputs in one go; `written` bytes a value come out."""
        if rows <= 0:
            return 0.0
        waves = many * max(1.0, rows * outputs / TILE) / self.units
        fill = inner / (inner + self.numbers.depth) * waves / (waves + 0.5)
        width = 1 if self.precision == "fp8" else 2
        moved = many * (width * inner * (rows + outputs) + written * rows * outputs)
        return max(2 * many * rows * inner * outputs / (self.peak * fill), moved / self.memory)

    def copy(self, size: float) -> float:
        return size / self.memory

    def layer(self, work: Work, split: Split) -> Parts:
        """One layer of one chip."""
        forward = backward = weight = small = 0.0
        summed = 2.0 * self.software.gradient_bytes  # gradients are added to what is there
        for matmul in work.matmuls:
            rows, inner, outputs, many = _shape(matmul, split)
            ahead = self.matmul(rows, inner, outputs, many)
            forward += ahead
            backward += self.matmul(rows, outputs, inner, many)
            weight += self.matmul(inner, rows, outputs, many, summed)
            small += ahead * (matmul.name in ("q_up", "kv_up"))
            if self.precision == "fp8":
                forward += self.copy(CAST_BYTES * many * rows * inner)
                backward += self.copy(CAST_BYTES * many * rows * outputs)
                weight += self.copy(
                    CAST_BYTES * many * rows * (inner + outputs) / 2
                )  # again, along the other axis
        passes = 1.0 if self.software.fused else self.numbers.passes
        wide = work.wide / (split.tp if split.sp else 1)
        light = self.copy(2 * split.rows * passes * (wide + work.narrow / split.tp))
        core, core_back = self.core(work, split)
        operations = (
            FORWARD_OPERATIONS + (EXPERT_OPERATIONS if work.experts else 0) + SUM_OPERATIONS * (split.tp > 1)
        )
        host = passes * operations * self.numbers.launch
        slow = 1.0 if self.software.fused else self.numbers.eager
        whole = max(slow * (forward + light + core), host)
        rest = slow * (backward + weight + 2 * light + core_back)
        yarn_attention_scale = slow * max(1.0, 2 * host / rest) if rest else slow
        return Parts(
            whole,
            (backward + 2 * light + core_back) * yarn_attention_scale,
            weight * yarn_attention_scale,
            core,
            light + small,
        )

    def core(self, work: Work, split: Split) -> tuple[float, float]:
        """Attention's scores and mixing, forward and backward."""
        heads = work.heads / split.tp
        if self.software.attention == "unfused":
            products = 2 * heads * (work.key + work.value) * split.rows * work.seen(split.seq, causal=False)
            ahead = products / (self.peak * work.key / (work.key + self.numbers.depth / 4))
            scores = SCORE_BYTES * heads * split.rows * split.seq
            return ahead + self.copy(scores), 2 * (ahead + self.copy(scores))
        late = (
            1.0 if self.software.zigzag else 2.0 - 1.0 / split.cp
        )  # the last chip of a plain split sees nearly all
        flops = 2 * heads * (work.key + work.value) * split.rows * late * work.seen(split.seq)
        return flops / self.flash, 2.5 * flops / self.flash


def _shape(matmul: Matmul, split: Split) -> tuple[float, float, float, float]:
    """Rows, inner and outer length, and how many such products one chip has."""
    tp = split.expert_tp if matmul.experts else split.tp
    inner = matmul.inputs / (tp if matmul.split == "in" else 1)
    outputs = matmul.outputs / (tp if matmul.split == "out" else 1)
    if not matmul.experts:
        return split.rows, inner, outputs, 1.0
    mine = matmul.experts / split.ep
    share = (
        split.tp / split.expert_tp
    )  # without tensor parallelism of experts, each chip has a tp-th of the tokens
    return split.rows * matmul.copies / share / mine, inner, outputs, mine
