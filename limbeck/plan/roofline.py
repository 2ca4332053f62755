"""Roofline model of one layer on one chip: matrix products, attention, memory traffic, launches.

product    2 rows k n / (peak x reached x fill),  or its bytes / bandwidth if that is longer
fill       k/(k + depth) x waves/(waves + 1/2)    short inner lengths and a last, half empty wave of tiles
attention  FLOPs over the keys seen / (peak x reached); unfused: whole square, and its scores through memory
the rest   bytes / bandwidth;  everything at least as long as the host needs to start it

A product is [rows, k] x [k, n], where the rows are tokens; `reached` is the share of the peak FLOP/s that
large products reach, and `depth` a fitted constant. A launch is an operation that the host starts on the
chip.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from .chips import Chip
from .constants import Constants, constants
from .cost import Matmul, Work

TILE = 128 * 256  # values that one multiprocessor makes at a time (cuBLAS, CUTLASS)
UNITS = {  # multiprocessors, by the beginning of a chip's name
    "a100": 108, "h200": 132, "h20": 78, "4090": 128, "4080": 76, "3090": 82, "3060": 28, "a6000": 84,
    "l40s": 142, "v100": 80, "b200": 148,
}  # fmt: skip
HOPPER_UNITS = 132  # multiprocessors of Hopper's other chips
FORWARD_OPERATIONS = 20  # launches of the host in a layer
EXPERT_OPERATIONS = 12  # launches more in a layer of experts
SUM_OPERATIONS = 8  # launches more with tensor parallelism
FULL = {"hopper": 989, "blackwell": 2250}  # TFLOPS of a whole chip
WATTS = 700  # watts at which the reached FLOP/s were fitted
# bytes an operand of an FP8 product: read, its largest value found, written in eight bits, and once
# transposed
CAST_BYTES = 6
# bytes a score forward, unfused: written, soft-maxed, dropped out, read (fp16, byte mask)
SCORE_BYTES = 13
BACKWARD_ATTENTION = 2.5  # times the FLOPs of the forward pass: flash attention computes the scores again


@dataclass(frozen=True)
class Software:
    """The properties of a training system that determine its speed and its memory.

    The default is a tuned one (Megatron-Core, compiled torchtitan, HAI-LLM); `EAGER` is plain PyTorch, and
    `EARLY` is from before FlashAttention (2022). `fused` is True if small operations are fused into few
    passes over memory. `attention` is "flash3", "flash2" or "unfused". `gradient_bytes` is bytes of a
    gradient when gradients are exchanged, `reduce` the library that sums them ("nccl" or "hfreduce").
    `hides_tensor` overlaps half of the communication of tensor parallelism with computing.
    """

    fused: bool = True
    attention: str = "flash3"
    gradient_bytes: int = 4
    reduce: str = "nccl"
    hides_tensor: bool = False
    bucket: float = 400e6  # bytes of gradients exchanged at a time
    zigzag: bool = True  # context parallelism gives each chip an early and a late piece of a sequence
    prefetches: bool = True  # gradients and weights are sent while other layers are computed
    sums_late: bool = False  # under ZeRO-3 only weights are: gradients are sent when their layer is done
    rings: int = 0  # rings of an exchange between nodes; 0: as many as there are cards
    gathers_twice: bool = True  # inputs gathered by sequence parallelism are gathered again for the gradients
    balanced: bool = False  # layers are dealt to stages by their cost, the head included

    @property
    def name(self) -> str:
        """The kind of system: `tuned`, `early` or `eager`."""
        if self.fused and self.attention == "flash3":
            return "tuned"
        return "early" if self.attention == "unfused" else "eager"


TUNED = Software()
EAGER = Software(fused=False, attention="flash2", bucket=50e6, balanced=True, prefetches=False)
EARLY = Software(attention="unfused")
FSDP = Software(fused=False, attention="flash2", gradient_bytes=2)  # PyTorch's, with prefetching
HAI = Software(reduce="hfreduce", attention="flash2")  # HAI-LLM on Fire-Flyer 2
TITAN = Software(attention="flash2", gathers_twice=False)  # compiled
# ZeRO-3 of 2021, with one ring, as arXiv 2104.04473 measured it
DEEPSPEED = Software(attention="unfused", gradient_bytes=2, rings=1, sums_late=True)


@dataclass(frozen=True)
class Split:
    """One chip's share of a layer.

    The chip has `rows` tokens of sequences of `seq` tokens, 1/`tp` of each matrix, and 1/`ep` of the experts,
    which get the tokens of `ep` chips. `sp` and `cp` are sequence and context parallelism, and `expert_tp` is
    the tensor parallelism of experts.
    """

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
    light: float  # norms, activations and small up-projections, forward: the part that V3 recomputes


@dataclass(frozen=True)
class _Products:
    """Seconds of a layer's matrix products: forward, and backward for inputs and for weights.

    `small` is the forward seconds of the small up-projections of latent attention.
    """

    forward: float
    backward: float
    weight: float
    small: float


@dataclass(frozen=True)
class Roofline:
    """The speed of one chip: `Roofline(find("h100"), "bf16").matmul(4096, 7168, 18432)` is 1.6 ms."""

    chip: Chip
    precision: str = "bf16"
    software: Software = TUNED
    numbers: Constants = field(default_factory=constants)

    @cached_property
    def peak(self) -> float:
        """FLOP/s that a large matrix product reaches."""
        chip = self.chip
        numbers = self.numbers
        rate = chip.rate(self.precision)
        if "gemm" in chip.figures and self.precision != "fp8":
            return 1e12 * chip.figure("gemm")
        if chip.generation in FULL:
            return min(rate * numbers.gemm_other, self._power_bound())
        if chip.generation in ("ampere", "volta"):
            return rate * numbers.gemm_ampere
        return rate * numbers.gemm_other

    def _power_bound(self) -> float:
        """Return the FLOP/s that the chip's power allows.

        An H20 has power to spare; a board of 500 W has less than a full one.
        """
        full = 1e12 * FULL[self.chip.generation]
        if self.precision == "fp8":
            reached = 2 * full * self.numbers.gemm_fp8
        else:
            reached = full * self.numbers.gemm_hopper
        watts = self.chip.figures.get("watts", WATTS)
        return reached * (watts / WATTS) ** self.numbers.power

    @cached_property
    def flash(self) -> float:
        """FLOP/s of the attention kernel, which works in 16 bits whatever the precision of the matrices."""
        chip = self.chip
        numbers = self.numbers
        rate = chip.rate("bf16" if "bf16" in chip.figures else "fp16")
        if chip.generation not in FULL:
            return rate * numbers.flash_ampere
        full = 1e12 * FULL[chip.generation]
        share = numbers.flash3_hopper if self.software.attention == "flash3" else numbers.flash_hopper
        return min(rate * numbers.flash_ampere, full * share)

    @cached_property
    def memory(self) -> float:
        """Bytes a second of memory that copies reach."""
        return self.chip.bandwidth * self.numbers.memory

    @cached_property
    def units(self) -> int:
        """The number of multiprocessors of the chip."""
        for name, units in UNITS.items():
            if self.chip.name.startswith(name):
                return units
        return HOPPER_UNITS

    @property
    def passes(self) -> float:
        """How many times eager code passes over memory where fused code does so once."""
        return 1.0 if self.software.fused else self.numbers.passes

    def matmul(
        self, rows: float, inner: float, outputs: float, many: float = 1.0, written: float = 2.0
    ) -> float:
        """Return the seconds of `many` products [rows, inner] x [inner, outputs] in one launch.

        Each value of the result takes `written` bytes.
        """
        if rows <= 0:
            return 0.0
        waves = many * max(1.0, rows * outputs / TILE) / self.units
        fill = inner / (inner + self.numbers.depth) * waves / (waves + 0.5)
        computing = 2 * many * rows * inner * outputs / (self.peak * fill)
        width = 1 if self.precision == "fp8" else 2
        moved = many * (width * inner * (rows + outputs) + written * rows * outputs)
        return max(computing, moved / self.memory)

    def copy(self, size: float) -> float:
        """Return the seconds of reading or writing `size` bytes."""
        return size / self.memory

    def layer(self, work: Work, split: Split) -> Parts:
        """Return the seconds of one layer on one chip, without communication."""
        products = self._products(work, split)
        wide = work.wide / (split.tp if split.sp else 1)
        light = self.copy(2 * split.rows * self.passes * (wide + work.narrow / split.tp))
        core, core_back = self.core(work, split)
        host = self._host(work, split)
        slow = 1.0 if self.software.fused else self.numbers.eager
        forward = max(slow * (products.forward + light + core), host)
        rest = slow * (products.backward + products.weight + 2 * light + core_back)
        stretch = slow * max(1.0, 2 * host / rest) if rest else slow
        return Parts(
            forward,
            (products.backward + 2 * light + core_back) * stretch,
            products.weight * stretch,
            core,
            light + products.small,
        )

    def _products(self, work: Work, split: Split) -> _Products:
        """Return the seconds of a layer's matrix products on one chip."""
        forward = backward = weight = small = 0.0
        summed = 2.0 * self.software.gradient_bytes  # weight gradients are read, added to, and written
        for matmul in work.matmuls:
            rows, inner, outputs, many = _shape(matmul, split)
            ahead = self.matmul(rows, inner, outputs, many)
            forward += ahead
            backward += self.matmul(rows, outputs, inner, many)
            weight += self.matmul(inner, rows, outputs, many, summed)
            if matmul.name in ("q_up", "kv_up"):
                small += ahead
            if self.precision == "fp8":
                bytes_a_row = CAST_BYTES * many * rows
                forward += self.copy(bytes_a_row * inner)
                backward += self.copy(bytes_a_row * outputs)
                weight += self.copy(bytes_a_row * (inner + outputs) / 2)  # cast along the other axis
        return _Products(forward, backward, weight, small)

    def _host(self, work: Work, split: Split) -> float:
        """Return the seconds that the host needs to launch the operations of a layer's forward pass."""
        operations = FORWARD_OPERATIONS
        if work.experts:
            operations += EXPERT_OPERATIONS
        if split.tp > 1:
            operations += SUM_OPERATIONS
        return self.passes * operations * self.numbers.launch

    def core(self, work: Work, split: Split) -> tuple[float, float]:
        """Return the forward and the backward seconds of attention's scores and weighted sums of values."""
        heads = work.heads / split.tp
        if self.software.attention == "unfused":
            products = 2 * heads * (work.key + work.value) * split.rows * work.seen(split.seq, causal=False)
            reached = self.peak * work.key / (work.key + self.numbers.depth / 4)
            scores = self.copy(SCORE_BYTES * heads * split.rows * split.seq)
            ahead = products / reached + scores
            return ahead, 2 * ahead
        # the last chip of a plain split sees nearly all keys
        late = 1.0 if self.software.zigzag else 2.0 - 1.0 / split.cp
        flops = 2 * heads * (work.key + work.value) * split.rows * late * work.seen(split.seq)
        return flops / self.flash, BACKWARD_ATTENTION * flops / self.flash


def _shape(matmul: Matmul, split: Split) -> tuple[float, float, float, float]:
    """Return the shape of a product on one chip: rows, inner length, outputs, and number of such products."""
    tp = split.expert_tp if matmul.experts else split.tp
    inner = matmul.inputs / (tp if matmul.split == "in" else 1)
    outputs = matmul.outputs / (tp if matmul.split == "out" else 1)
    if not matmul.experts:
        return split.rows, inner, outputs, 1.0
    own = matmul.experts / split.ep
    share = split.tp / split.expert_tp  # with whole experts, each chip has a tp-th of the tokens
    return split.rows * matmul.copies / share / own, inner, outputs, own
