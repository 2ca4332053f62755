"""The best layouts of a model on a cluster.

All possible layouts are candidates. A candidate is dropped if it does not fit in memory, or if a lower bound
of its step time is clearly above the best estimate. Step times are estimated by formulas, and the pipelines
of the best few candidates are simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..model.config import ModelConfig
from ..types import LimbeckError
from . import cost
from .cluster import Cluster
from .layout import Layout, possible
from .memory import Memory, fit
from .roofline import TUNED, Roofline, Software
from .step import Foresight, Step, foresee

MICRO = (1, 2, 4, 8)
RECOMPUTE = ("none", "selective", "v3", "full")  # each takes longer and needs less memory
LATE = 1.25  # times the best estimate: layouts with a higher lower bound are not estimated
EXACTLY = 8  # candidates that are simulated in addition to the `top` ones
MAX_STAGES = 64  # most stages of a pipeline
MAX_CONTEXT = 16  # most chips of context parallelism
MIN_CONTEXT_TOKENS = 4096  # fewest tokens of a sequence on each chip
MAX_EXPERT_SHARDS = 256  # most chips of expert parallelism


@dataclass(frozen=True)
class Choice:
    """A layout with the forecast of its step and of its memory."""

    layout: Layout
    step: Step
    memory: Memory

    def tell(self) -> str:
        """Return a description of the layout, its step time and its memory in one line."""
        step = self.step
        time = f"{step.seconds:.3g} s a step, MFU {step.mfu:.1%}; {step.binds}"
        return f"{self.layout.tell()}: {time}; {self.memory.tell()}"


class _Candidate(NamedTuple):
    """A layout that fits in memory, with its estimated seconds a step."""

    seconds: float
    layout: Layout
    memory: Memory


def best(
    config: ModelConfig,
    cluster: Cluster,
    batch: int,
    seq: int,
    precision: str = "bf16",
    software: Software = TUNED,
    top: int = 5,
) -> list[Choice]:
    """Return the `top` layouts with the shortest step, best first.

    `batch` is the sequences of a step, `seq` the tokens of a sequence. Raises LimbeckError if no layout fits
    in memory.
    """
    candidates = _candidates(config, cluster, batch, seq, Roofline(cluster.chip, precision, software))
    if not candidates:
        raise LimbeckError(_explain(config, cluster, batch, seq, software))
    candidates.sort(key=lambda candidate: candidate.seconds)
    choices = []
    for candidate in _different(candidates)[: EXACTLY + top]:
        forecast = foresee(config, cluster, candidate.layout, batch, seq, precision, software)
        choices.append(Choice(candidate.layout, forecast.step(), candidate.memory))
    choices.sort(key=lambda choice: choice.step.seconds)
    return choices[:top]


def _candidates(
    config: ModelConfig, cluster: Cluster, batch: int, seq: int, roof: Roofline
) -> list[_Candidate]:
    """Return the layouts that fit in memory, with their estimated step time.

    Layouts are tried in the order of a lower bound of their time, until that is more than LATE times the best
    estimate.
    """
    candidates: list[_Candidate] = []
    least = float("inf")
    costs_of_layers: dict = {}
    flops = cost.flops_per_token(config, seq) * batch * seq
    pace = flops / roof.peak
    by_ideal = sorted(layouts(config, cluster, batch, seq), key=lambda layout: ideal(layout, batch, pace))
    for unfitted in by_ideal:
        if ideal(unfitted, batch, pace) > LATE * least:
            break
        fitted = _leanest(config, cluster, unfitted, batch, seq, roof)
        if fitted is None:
            continue
        layout, memory = fitted
        forecast = Foresight(config, cluster, layout, batch, seq, roof, False, costs_of_layers)
        seconds = forecast.step().seconds
        least = min(least, seconds)
        candidates.append(_Candidate(seconds, layout, memory))
    return candidates


def _leanest(
    config: ModelConfig, cluster: Cluster, layout: Layout, batch: int, seq: int, roof: Roofline
) -> tuple[Layout, Memory] | None:
    """Return the layout with as little recomputation as makes it fit in memory, and its memory.

    The result is None if it fits with no mode of recomputation.
    """
    for recompute in RECOMPUTE:
        changed = layout.change(recompute=recompute)
        memory = fit(config, cluster, changed, seq, roof.software, roof.precision, batch)
        if memory.fits:
            return changed, memory
    return None


def ideal(layout: Layout, batch: int, pace: float) -> float:
    """Return a lower bound of a layout's seconds a step, with the ideal bubble of its schedule.

    `batch` is the sequences of a step, and `pace` the seconds that one chip at full speed needs for all FLOPs
    of a step.
    """
    waits = 1 / layout.chunks
    if layout.schedule in ("zb1p", "dualpipe", "dualpipev"):
        waits = 0.3
    bubble = waits * (layout.pp - 1) / layout.micro_batches(batch)
    return pace / layout.chips * (1 + bubble)


def layouts(config: ModelConfig, cluster: Cluster, batch: int, seq: int) -> Iterator[Layout]:
    """Yield the layouts that use all chips, or else the largest number of chips that divides the batch."""
    count = _usable(cluster, batch)
    for tp in _powers(cluster.per_node):
        if count % tp != 0:
            continue
        for pp in _pipelines(config, count // tp):
            for cp in _contexts(seq, count // (tp * pp)):
                dp = count // (tp * pp * cp)
                if dp <= batch and batch % dp == 0:
                    yield from _variants(config, cluster, batch, Layout(dp=dp, tp=tp, pp=pp, cp=cp))


def _usable(cluster: Cluster, batch: int) -> int:
    """Return the largest number of chips, in whole nodes, over which the batch divides evenly.

    The search ends at half of the cluster.
    """
    count = cluster.count
    while count > 1 and count > cluster.count // 2:
        for tp in _powers(cluster.per_node):
            if count % tp == 0 and batch % (count // tp) == 0:
                return count
        count -= cluster.per_node if count > cluster.per_node else 1
    return count


def _pipelines(config: ModelConfig, chips: int) -> list[int]:
    """Return the numbers of pipeline stages that divide `chips`: 1 and even numbers."""
    most = min(MAX_STAGES, config.layers)
    sizes = (1, *range(2, most + 1, 2))
    return [pp for pp in sizes if chips % pp == 0]


def _contexts(seq: int, chips: int) -> list[int]:
    """Return the degrees of context parallelism that divide `chips`.

    Each chip gets at least MIN_CONTEXT_TOKENS tokens of a sequence.
    """
    sizes = [cp for cp in _powers(MAX_CONTEXT) if chips % cp == 0]
    return [cp for cp in sizes if cp == 1 or seq / cp >= MIN_CONTEXT_TOKENS]


def _variants(config: ModelConfig, cluster: Cluster, batch: int, base: Layout) -> Iterator[Layout]:
    """Yield the layouts with the data, tensor, pipeline and context parallelism of `base`.

    They differ in expert parallelism, micro-batch, schedule and ZeRO stage.
    """
    own = batch // base.dp
    for ep in _expert_shards(config, base):
        for micro in MICRO:
            if own % micro != 0:
                continue
            for schedule, chunks in _schedules(config, base, own // micro):
                layout = base.change(ep=ep, micro=micro, schedule=schedule, chunks=chunks)
                if config.experts:
                    overlap = schedule in ("interleaved", "dualpipe")
                    layout = layout.change(expert_tp=1, overlap=overlap)
                for zero in (1, 3) if base.pp == 1 else (1,):
                    sharded = layout.change(zero=zero)
                    if possible(sharded, config, cluster, batch):
                        yield sharded


def _expert_shards(config: ModelConfig, base: Layout) -> list[int]:
    """Return the degrees of expert parallelism to try; only 1 for a dense model."""
    if not config.experts:
        return [1]
    sizes = _powers(min(base.copies, MAX_EXPERT_SHARDS))
    return [ep for ep in sizes if config.experts.count % ep == 0]


def _schedules(config: ModelConfig, base: Layout, micro: int) -> list[tuple[str, int]]:
    """Return the pipeline schedules to try with `micro` micro-batches, each with its chunks a chip."""
    pp = base.pp
    if pp == 1:
        return [("1f1b", 1)]
    schedules = [("1f1b", 1), ("zb1p", 1)]
    if micro % pp == 0:
        schedules += [("interleaved", chunks) for chunks in (2, 4) if config.layers >= pp * chunks]
    if pp % 2 == 0 and micro >= 2 * pp and micro % 2 == 0:
        schedules.append(("dualpipe", 1))
    return schedules


def _powers(most: int) -> list[int]:
    """Return the powers of two from 1 to `most`."""
    return [2**i for i in range(most.bit_length())]


def _different(candidates: list[_Candidate]) -> list[_Candidate]:
    """Return the first candidate of each combination of parallelism and schedule."""
    first = {}
    for candidate in candidates:
        at = candidate.layout
        key = (at.tp, at.pp, at.cp, at.ep, at.schedule)
        first.setdefault(key, candidate)
    return list(first.values())


def _explain(config: ModelConfig, cluster: Cluster, batch: int, seq: int, software: Software) -> str:
    """Return the reason why no layout fits, as a sentence for the user."""
    least: Memory | None = None
    for layout in layouts(config, cluster, batch, seq):
        memory = fit(config, cluster, layout.change(recompute="full"), seq, software, batch=batch)
        if least is None or memory.total < least.total:
            least = memory
    if least is None:
        chips = cluster.count
        return f"{batch} sequences a step cannot be dealt to {chips} chips; choose a batch that divides"
    size = f"{config.parameters / 1e9:.3g}G parameters"
    return f"{size} do not fit {cluster.tell()}: the leanest layout takes {least.tell()}"
