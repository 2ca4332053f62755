"""How long one step takes, what binds it, and how sure that is.

A micro-batch goes through stages; each stage's forward and backward passes come from `roofline`, exchanges from
`collectives`, the order from `schedules`. What can hide behind computing is hidden; the rest is exposed and named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import log2

from ..model.config import ModelConfig
from . import collectives, cost, pipeline_schedules
from .cluster import Cluster
from .constants import Constants, constants
from .layout import Layout, check
from .pipeline_schedules import Times
from .roofline import TUNED, Roofline, Software
from .stage_cost import Cost, Stages

SPREAD = {"tested": 0.18, "untested": 0.40}  # half width of the interval, as `plan verify` measures it
TESTED = ("ampere", "hopper")
OPTIMIZER_BYTES = 40  # a weight: gradient, master copy and two moments read and written, norm, new weight

WORDS = {
    "compute": "computing",
    "recompute": "recomputing activations",
    "tensor": "tensor-parallel sums",
    "context": "passing keys and values round",
    "experts": "all-to-all of experts",
    "data": "exchanging gradients and weights",
    "bubble": "the pipeline's bubble",
    "optimizer": "the optimiser",
    "jitter": "waiting for the slowest",
    "sites": "averaging over sites",
}


@dataclass(frozen=True)
class Step:
    """One step: `seconds` within `low`..`high`; `parts` sum to it; `binds` says in words what costs most."""

    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    binds: str
    tokens: float
    chips: int
    flops_per_token: float
    peak: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        """Model TFLOPS a chip, convention "causal"."""
        return self.flops_per_token * self.tokens / self.seconds / self.chips / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: convention "causal", against the 16-bit peak."""
        return self.tflops * 1e12 / self.peak


@dataclass(frozen=True)
class Foresight:
    """Everything a step's forecast is made of; `predict` makes one and reads it."""

    config: ModelConfig
    cluster: Cluster
    layout: Layout
    batch: int
    seq: int
    roof: Roofline
    exact: bool = True  # events; otherwise formulas
    made: dict = field(default_factory=dict, compare=False)  # layers costed already

    @cached_property
    def stages(self) -> Stages:
        return Stages(self.config, self.cluster, self.layout, self.seq, self.roof, self.made)

    @property
    def micro(self) -> int:
        return self.layout.micro_batches(self.batch)

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        """Of each stage, with parameters fetched for each micro-batch where ZeRO-3 does that."""
        return self.stages.costs

    @cached_property
    def send(self) -> float:
        """Seconds of handing one micro-batch to the next stage."""
        at = self.layout
        if at.pp == 1:
            return 0.0
        size = 2 * self.stages.rows * self.config.hidden_size / (at.tp if at.sp else 1)
        return collectives.send(
            self.cluster, size, at.chips <= self.cluster.per_node, self.roof.numbers.links, self.stages.cards
        )

    @cached_property
    def times(self) -> Times:
        """What the schedule plays; eager code waits for its messages, tuned code only for their arrival."""
        wait = 0.0 if self.roof.software.fused else self.send
        fetch = [self.fetched(stage) for stage in range(len(self.costs))]
        both = self.layout.schedule.startswith("dualpipe")
        hidden = [
            c.paired / (c.computing + c.waiting) if self.layout.overlap and not both else 1.0
            for c in self.costs
        ]
        return Times(
            tuple(h * c.ahead + wait + f[0] for c, f, h in zip(self.costs, fetch, hidden, strict=True)),
            tuple(h * c.back + wait + f[1] for c, f, h in zip(self.costs, fetch, hidden, strict=True)),
            tuple(h * c.weight for c, h in zip(self.costs, hidden, strict=True)),
            self.send,
            tuple(c.paired for c in self.costs) if both else (),
        )

    def fetched(self, stage: int) -> tuple[float, float]:
        """ZeRO-3, a micro-batch: weights gathered forward and backward, gradients scattered, behind computing."""
        if self.layout.zero < 3:
            return 0.0, 0.0
        cost, software = self.costs[stage], self.roof.software
        layer = 2 * sum(self.held(stage)) / max(1, len(self.stages.layers[stage]))
        gather = self.exchange(stage, 2, layer)
        scatter = self.exchange(stage, software.gradient_bytes, layer)
        hidden, late = (gather, scatter) if software.sums_late else (gather + scatter, 0.0)
        forward = max(0.0, gather - self.hiding * cost.forward)
        return forward, max(0.0, hidden - self.hiding * (cost.backward + cost.weight)) + late

    @property
    def hiding(self) -> float:
        return self.roof.numbers.prefetched if self.roof.software.prefetches else self.roof.numbers.hidden

    def held(self, stage: int) -> tuple[float, float]:
        """Weights of a stage on one chip: those that all data-parallel chips share, and its experts."""
        at, works = self.layout, self.stages.works
        mine = [works[layer] for layer in self.stages.layers[stage]]
        experts = sum(w.expert_weights for w in mine) / (at.ep * at.experts_split)
        dense = sum(w.weights - w.expert_weights for w in mine) / at.tp
        ends = (stage == 0) + (stage == self.stages.count - 1) * (
            not self.config.tied or self.stages.count > 1
        )
        return dense + ends * self.config.vocab_size * self.config.hidden_size / at.tp, experts

    def exchange(self, stage: int, width: float, bucket: float, summed: bool = False) -> float:
        """Seconds to gather a stage's weights of `width` bytes over the chips that share them, in messages of `bucket`
        bytes; to scatter gradients takes as long. `summed` is an all-reduce."""
        at, (dense, experts) = self.layout, self.held(stage)
        copies = at.dp * at.cp
        expert_copies = max(1, copies * at.tp // (at.experts_split * at.ep))
        total = 0.0
        exchange = collectives.all_reduce if summed else collectives.all_gather
        if self.roof.software.reduce == "hfreduce":
            exchange, width = (
                collectives.hfreduce,
                width / 2,
            )  # a sum is a scatter and a gather: half for each
        for weights, size, stride in (
            (dense, copies, at.tp),
            (experts, expert_copies, at.ep * at.experts_split),
        ):
            if weights and size > 1:
                whole = width * weights
                messages = max(1.0, whole / bucket)
                total += messages * exchange(
                    self.stages.group(size, stride, self.roof.software.rings), whole / messages
                )
        return total

    @cached_property
    def data(self) -> float:
        """Exposed exchange of gradients and weights, a step: the last backward pass and the first forward one hide a part.
        Where weight gradients come last, only they do."""
        if self.layout.zero == 3 or self.layout.dp * self.layout.cp == 1:
            return 0.0
        worst = 0.0
        for chip in range(self.layout.pp):
            stages = self.layout.owned(chip)
            last, software, shards = self.costs[chip], self.roof.software, bool(self.layout.zero)
            width = software.gradient_bytes
            out = sum(self.exchange(stage, width, software.bucket, not shards) for stage in stages)
            home = sum(self.exchange(stage, 2, software.bucket / 2) for stage in stages) if shards else 0.0
            back = last.weight + last.backward * (self.layout.schedule not in pipeline_schedules.LATE)
            late = max(0.0, out - self.hiding * back) + max(0.0, home - self.hiding * last.forward)
            worst = max(worst, late)
        return worst

    @cached_property
    def optimizer(self) -> float:
        at = self.layout
        worst = 0.0
        for chip in range(at.pp):
            held = [self.held(stage) for stage in at.owned(chip)]
            copies = at.dp * at.cp if at.zero else 1
            expert_copies = max(1, copies * at.tp // (at.experts_split * at.ep)) if at.zero else 1
            worst = max(worst, sum(dense / copies + experts / expert_copies for dense, experts in held))
        return self.roof.copy(OPTIMIZER_BYTES * worst)

    @cached_property
    def pipeline(self) -> tuple[float, float]:
        """Seconds of all micro-batches, and of its bubble."""
        at, times = self.layout, self.times
        if at.pp == 1 and self.stages.count == 1:
            return self.micro * (times.forward[0] + times.backward[0] + times.weight[0]), 0.0
        play = pipeline_schedules.seconds if self.exact else pipeline_schedules.quick
        return play(at.schedule, times, at.pp, self.micro, at.chunks)

    def step(self) -> Step:
        whole, bubble = self.pipeline
        before = whole + self.data + self.optimizer
        jitter = before * self.roof.numbers.jitter * log2(self.cluster.across(self.layout.chips).nodes or 1)
        seconds = before + jitter
        parts = self.parts(whole - bubble) | {
            "bubble": bubble,
            "data": self.data,
            "optimizer": self.optimizer,
            "jitter": jitter,
        }
        spread = SPREAD["tested" if self.cluster.chip.generation in TESTED else "untested"]
        chip = self.cluster.chip
        return Step(
            seconds,
            seconds / (1 + spread),
            seconds * (1 + spread),
            {k: v for k, v in parts.items() if v > 0},
            binds(parts, seconds),
            self.batch * self.seq,
            self.layout.chips,
            cost.flops_per_token(self.config, self.seq),
            chip.rate("bf16" if "bf16" in chip.figures else "fp16"),
        )

    def parts(self, busy: float) -> dict[str, float]:
        """What the busiest stage does meanwhile, in proportion."""
        stage = max(self.costs, key=lambda c: c.computing + c.waiting)
        overlaps = self.layout.overlap or bool(self.times.paired)
        kinds = {
            "compute": stage.computing - stage.again,
            "recompute": stage.again,
            "tensor": sum(stage.tensor),
            "context": sum(stage.context),
            "experts": max(0.0, stage.paired - stage.computing) if overlaps else sum(stage.experts),
        }
        fetch = sum(self.fetched(0))
        kinds["data"] = fetch
        total = sum(kinds.values())
        return {kind: busy * value / total for kind, value in kinds.items()}


def binds(parts: dict[str, float], seconds: float) -> str:
    """What costs most beside computing: "all-to-all of experts: 31 % of the step"."""
    name, value = max(((k, v) for k, v in parts.items() if k != "compute"), key=lambda item: item[1])
    share = value / seconds
    if share < 0.05 or parts["compute"] > 0.8 * seconds:
        return f"computing: {parts['compute'] / seconds:.0%} of the step"
    return f"{WORDS[name]}: {share:.0%} of the step"


def predict(
    config: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    batch: int,
    seq: int,
    precision: str = "bf16",
    software: Software = TUNED,
    numbers: Constants | None = None,
) -> Step:
    """Foresee a step of `batch` sequences of `seq` tokens; impossible layouts are refused in one sentence."""
    check(layout, config, cluster, batch)
    return foresee(config, cluster, layout, batch, seq, precision, software, numbers).step()


def foresee(
    config, cluster, layout, batch, seq, precision="bf16", software=TUNED, numbers=None, exact=True
) -> Foresight:
    """The same, with all that it is made of; not `exact` is by formulas, for searching."""
    return Foresight(
        config,
        cluster,
        layout,
        batch,
        seq,
        Roofline(cluster.chip, precision, software, numbers or constants()),
        exact,
    )
