"""The best layout of a model on a cluster: every layout that can be, pruned by memory and by what computing alone
would take; the few best by events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..model.config import ModelConfig
from ..types import LimbeckError
from . import cost
from .cluster import Cluster
from .layout import Layout, possible
from .memory import Memory, fit
from .roofline import TUNED, Roofline, Software
from .step import Foresight, Step, foresee

MICRO = (1, 2, 4, 8)
RECOMPUTE = ("none", "selective", "v3", "full")  # each takes longer and holds less
LATE = 1.25  # a layout whose computing and bubble alone take so much longer than the best is not looked at
EXACTLY = 8  # candidates that are simulated


@dataclass(frozen=True)
class Choice:
    """A layout with what it takes, and why it is not faster."""

    layout: Layout
    step: Step
    memory: Memory

    def tell(self) -> str:
        return f"{self.layout.tell()}: {self.step.seconds:.3g} s a step, MFU {self.step.mfu:.1%}; {self.step.binds}; {self.memory.tell()}"


def best(
    config: ModelConfig,
    cluster: Cluster,
    batch: int,
    seq: int,
    precision: str = "bf16",
    software: Software = TUNED,
    top: int = 5,
) -> list[Choice]:
    """The `top` best layouts, best first; one sentence where none fits."""
    found: list[tuple[float, Layout, Memory]] = []
    least = float("inf")
    roof, made = Roofline(cluster.chip, precision, software), {}
    pace = cost.flops_per_token(config, seq) * batch * seq / roof.peak
    for layout in sorted(layouts(config, cluster, batch, seq), key=lambda at: ideal(at, batch, pace)):
        if ideal(layout, batch, pace) > LATE * least:
            break
        if (one := _leanest(config, cluster, layout, batch, seq, precision, software)) is None:
            continue
        layout, memory = one
        seconds = Foresight(config, cluster, layout, batch, seq, roof, False, made).step().seconds
        least = min(least, seconds)
        found.append((seconds, layout, memory))
    if not found:
        raise LimbeckError(_nothing(config, cluster, batch, seq, software))
    few = _different(sorted(found, key=lambda one: one[0]), EXACTLY + top)
    exact = [
        Choice(layout, foresee(config, cluster, layout, batch, seq, precision, software).step(), memory)
        for _, layout, memory in few
    ]
    return sorted(exact, key=lambda choice: choice.step.seconds)[:top]


def _leanest(
    config: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    batch: int,
    seq: int,
    precision: str,
    software: Software,
):
    """The layout with as little recomputation as memory allows; None if even the most does not fit."""
    for recompute in RECOMPUTE:
        at = layout.change(recompute=recompute)
        if (memory := fit(config, cluster, at, seq, software, precision, batch)).fits:
            return at, memory
    return None


def ideal(layout: Layout, batch: int, pace: float) -> float:
    """No layout of its kind is faster: every FLOP at full speed (`pace` on one chip), and its schedule's bubble."""
    waits = 0.3 if layout.schedule in ("zb1p", "dualpipe", "dualpipev") else 1 / layout.chunks
    return pace / layout.chips * (1 + waits * (layout.pp - 1) / layout.micro_batches(batch))


def layouts(config: ModelConfig, cluster: Cluster, batch: int, seq: int) -> Iterator[Layout]:
    """Layouts that use all chips, or the most of them that a batch divides over."""
    count = cluster.count
    while (
        count > 1
        and not any(count % tp == 0 and batch % (count // tp) == 0 for tp in _powers(cluster.per_node))
        and count > cluster.count // 2
    ):
        count -= cluster.per_node if count > cluster.per_node else 1
    for tp in _powers(cluster.per_node):
        for pp in [
            n
            for n in range(1, min(64, config.layers) + 1)
            if count % (tp * n) == 0 and (n <= 2 or n % 2 == 0)
        ]:
            for cp in [n for n in _powers(16) if count % (tp * pp * n) == 0 and (n == 1 or seq / n >= 4096)]:
                dp = count // (tp * pp * cp)
                if dp <= batch and batch % dp == 0:
                    yield from _variants(config, cluster, batch, Layout(dp=dp, tp=tp, pp=pp, cp=cp))


def _variants(config: ModelConfig, cluster: Cluster, batch: int, base: Layout) -> Iterator[Layout]:
    mixed = config.experts is not None
    copies = base.dp * base.cp
    splits = [ep for ep in _powers(copies) if config.experts.count % ep == 0 and ep <= 256] if mixed else [1]
    mine = batch // base.dp
    for ep in splits:
        for micro in [m for m in MICRO if mine % m == 0]:
            for schedule, chunks in _schedules(config, base, mine // micro):
                for zero in (1, 3) if base.pp == 1 else (1,):
                    at = base.change(
                        ep=ep,
                        micro=micro,
                        schedule=schedule,
                        chunks=chunks,
                        zero=zero,
                        expert_tp=1 if mixed else 0,
                        overlap=mixed and schedule in ("interleaved", "dualpipe"),
                    )
                    if possible(at, config, cluster, batch):
                        yield at


def _schedules(config: ModelConfig, base: Layout, micro: int) -> list[tuple[str, int]]:
    pp = base.pp
    if pp == 1:
        return [("1f1b", 1)]
    found = [("1f1b", 1), ("zb1p", 1)]
    if micro % pp == 0:
        found += [("interleaved", n) for n in (2, 4) if config.layers >= pp * n]
    if pp % 2 == 0 and micro >= 2 * pp and micro % 2 == 0:
        found += [("dualpipe", 1)]
    return found


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _different(found: list[tuple[float, Layout, Memory]], most: int) -> list[tuple[float, Layout, Memory]]:
    """The best of each way of cutting and scheduling, so that five are five ideas."""
    seen, few = set(), []
    for one in found:
        at = one[1]
        key = (at.tp, at.pp, at.cp, at.ep, at.schedule)
        if key not in seen:
            seen.add(key)
            few.append(one)
    return few[:most]


def _nothing(config: ModelConfig, cluster: Cluster, batch: int, seq: int, software: Software) -> str:
    lean = (layout.change(recompute="full") for layout in layouts(config, cluster, batch, seq))
    tried = [fit(config, cluster, layout, seq, software, batch=batch) for layout in lean]
    if not tried:
        return (
            f"{batch} sequences a step cannot be dealt to {cluster.count} chips; choose a batch that divides"
        )
    least = min(tried, key=lambda memory: memory.total)
    return f"{config.parameters / 1e9:.3g}G parameters do not fit {cluster.tell()}: the leanest layout takes {least.tell()}"
