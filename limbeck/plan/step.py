"""The duration of one training step, its parts, its bottleneck and its uncertainty.

A micro-batch goes through the stages of a pipeline. The times of each stage's forward and backward passes
come from `stage_cost` and `roofline`, those of exchanges (communication between chips) from `collectives`,
and the order of the passes from `pipeline_schedules`. Exchanges are hidden behind computing if the software
can do that; the rest is called exposed and is listed as a part of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import log2

from ..model.config import ModelConfig
from . import collectives, cost, pipeline_schedules
from .cluster import Cluster
from .layout import Layout, check
from .pipeline_schedules import Times
from .roofline import TUNED, Roofline, Software
from .stage_cost import Cost, Stages

SPREAD = {"tested": 0.18, "untested": 0.40}  # half width of the interval, as `plan verify` measures it
TESTED = ("ampere", "hopper")
OPTIMIZER_BYTES = 40  # a weight: gradient, master copy and two moments read and written, norm, new weight
BINDING_SHARE = 0.05  # share of a step: a smaller part is no bottleneck
COMPUTING_SHARE = 0.8  # share of a step: computing that takes more is the bottleneck

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
    """The forecast of one training step.

    It takes `seconds`, between `low` and `high`; `parts` sum to `seconds`, and `binds` names the bottleneck.
    `tokens` is the tokens of a step on all `chips` chips; `flops_per_token` counts causal attention (see
    `cost.CONVENTIONS`), and `peak` is the 16-bit peak FLOP/s of one chip.
    """

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
        """Tokens a second of all chips together."""
        return self.tokens / self.seconds

    @property
    def tflops(self) -> float:
        """Model TFLOP/s of one chip, with attention over half of the sequence (convention "causal")."""
        return self.flops_per_token * self.tokens / self.seconds / self.chips / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: `tflops` as a share of the chip's 16-bit peak."""
        return self.tflops * 1e12 / self.peak


@dataclass(frozen=True)
class Foresight:
    """The forecast of a step of `batch` sequences of `seq` tokens.

    The other properties are its parts; `step` puts them together.
    """

    config: ModelConfig
    cluster: Cluster
    layout: Layout
    batch: int
    seq: int
    roof: Roofline
    exact: bool = True  # the schedule is simulated; otherwise its formulas are used
    made: dict = field(default_factory=dict, compare=False)  # costs of layers, shared by many layouts

    @cached_property
    def stages(self) -> Stages:
        """The model's stages under the layout."""
        return Stages(self.config, self.cluster, self.layout, self.seq, self.roof, self.made)

    @property
    def micro(self) -> int:
        """The micro-batches that one pipeline processes in a step."""
        return self.layout.micro_batches(self.batch)

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        """The cost of one micro-batch in each stage, without the exchanges of ZeRO-3."""
        return self.stages.costs

    @cached_property
    def send(self) -> float:
        """Seconds to send one micro-batch to the next stage."""
        at = self.layout
        if at.pp == 1:
            return 0.0
        size = 2 * self.stages.rows * self.config.hidden_size / (at.tp if at.sp else 1)
        inside = at.chips <= self.cluster.per_node
        return collectives.send(self.cluster, size, inside, self.roof.numbers.links, self.stages.cards)

    @cached_property
    def times(self) -> Times:
        """Seconds of each stage's passes, exposed exchanges included.

        Eager code also waits until its message to the next stage is sent.
        """
        wait = 0.0 if self.roof.software.fused else self.send
        dual = self.layout.dual
        forward = []
        backward = []
        weight = []
        for stage, costs in enumerate(self.costs):
            fetch_forward, fetch_backward = self.fetch(stage)
            left = 1.0  # share of the seconds that overlapping leaves
            if self.layout.overlap and not dual:
                left = costs.paired / (costs.computing + costs.waiting)
            forward.append(left * costs.ahead + wait + fetch_forward)
            backward.append(left * costs.back + wait + fetch_backward)
            weight.append(left * costs.weight)
        paired = tuple(costs.paired for costs in self.costs) if dual else ()
        return Times(tuple(forward), tuple(backward), tuple(weight), self.send, paired)

    def fetch(self, stage: int) -> tuple[float, float]:
        """Return the exposed seconds of ZeRO-3 for one micro-batch in a stage, forward and backward.

        Weights are gathered in both passes and gradients are scattered in the backward pass; both are partly
        hidden behind computing.
        """
        if self.layout.zero < 3:
            return 0.0, 0.0
        costs = self.costs[stage]
        software = self.roof.software
        layer = 2 * sum(self.weights(stage)) / max(1, len(self.stages.layers[stage]))
        gather = self.exchange(stage, 2, layer)
        scatter = self.exchange(stage, software.gradient_bytes, layer)
        forward = max(0.0, gather - self.hiding * costs.forward)
        computing = self.hiding * (costs.backward + costs.weight)
        if software.sums_late:
            return forward, max(0.0, gather - computing) + scatter
        return forward, max(0.0, gather + scatter - computing)

    @property
    def hiding(self) -> float:
        """The share of the computing time behind which exchanges can hide."""
        numbers = self.roof.numbers
        return numbers.prefetched if self.roof.software.prefetches else numbers.hidden

    def weights(self, stage: int) -> tuple[float, float]:
        """Return the numbers of a stage's dense and expert weights on one chip, before ZeRO shards them."""
        at = self.layout
        dense = 0
        experts = 0
        for layer in self.stages.layers[stage]:
            work = self.stages.works[layer]
            dense += work.weights - work.expert_weights
            experts += work.expert_weights
        own_head = not self.config.tied or self.stages.count > 1
        tables = (stage == 0) + (stage == self.stages.count - 1) * own_head
        table = tables * self.config.vocab_size * self.config.hidden_size / at.tp
        return dense / at.tp + table, experts / at.expert_shards

    def exchange(self, stage: int, width: float, bucket: float, summed: bool = False) -> float:
        """Return the seconds to gather a stage's weights over the chips that share them.

        A weight has `width` bytes, and messages have `bucket` bytes. Scattering gradients of this width takes
        as long. `summed` takes the time of an all-reduce instead.
        """
        at = self.layout
        dense, experts = self.weights(stage)
        collective = collectives.all_reduce if summed else collectives.all_gather
        if self.roof.software.reduce == "hfreduce":
            collective = collectives.hfreduce
            width /= 2  # a sum is a scatter and a gather: half for each
        total = 0.0
        for weights, size, stride in (
            (dense, at.copies, at.tp),
            (experts, at.expert_copies, at.expert_shards),
        ):
            if not weights or size == 1:
                continue
            whole = width * weights
            messages = max(1.0, whole / bucket)
            group = self.stages.group(size, stride, self.roof.software.rings)
            total += messages * collective(group, whole / messages)
        return total

    @cached_property
    def data(self) -> float:
        """Exposed seconds a step for exchanging gradients and weights, without those of ZeRO-3.

        It is the time of the slowest chip of a pipeline.
        """
        if self.layout.zero == 3 or self.layout.copies == 1:
            return 0.0
        return max(0.0, *(self._exposed(chip) for chip in range(self.layout.pp)))

    def _exposed(self, chip: int) -> float:
        """Return the exposed seconds in which one chip of a pipeline exchanges gradients and weights.

        The last backward pass and the first forward pass hide a part of them. In schedules that end with
        weight gradients, only the weight gradients hide the exchange of gradients.
        """
        stages = self.layout.owned(chip)
        costs = self.costs[chip]
        software = self.roof.software
        shards = self.layout.zero > 0
        width = software.gradient_bytes
        reduce = 0.0
        gather = 0.0
        for stage in stages:
            reduce += self.exchange(stage, width, software.bucket, summed=not shards)
            if shards:
                gather += self.exchange(stage, 2, software.bucket / 2)
        back = costs.weight
        if self.layout.schedule not in pipeline_schedules.LATE:
            back += costs.backward
        late = max(0.0, reduce - self.hiding * back)
        return late + max(0.0, gather - self.hiding * costs.forward)

    @cached_property
    def optimizer(self) -> float:
        """Seconds of the optimiser's update on the chip with the most weights."""
        at = self.layout
        copies = at.copies if at.zero else 1
        expert_copies = at.expert_copies if at.zero else 1
        most = 0.0
        for chip in range(at.pp):
            own = 0.0
            for stage in at.owned(chip):
                dense, experts = self.weights(stage)
                own += dense / copies + experts / expert_copies
            most = max(most, own)
        return self.roof.copy(OPTIMIZER_BYTES * most)

    @cached_property
    def pipeline(self) -> tuple[float, float]:
        """Seconds in which a pipeline processes all micro-batches, and the seconds of the bubble in them."""
        at = self.layout
        if at.pp == 1 and self.stages.count == 1:
            return self.micro * self.times.whole(0), 0.0
        play = pipeline_schedules.seconds if self.exact else pipeline_schedules.quick
        return play(at.schedule, self.times, at.pp, self.micro, at.chunks)

    def step(self) -> Step:
        """Return the forecast of the step, with its interval, parts and bottleneck."""
        whole, bubble = self.pipeline
        before = whole + self.data + self.optimizer
        nodes = self.cluster.across(self.layout.chips).nodes
        jitter = before * self.roof.numbers.jitter * log2(nodes or 1)
        seconds = before + jitter
        parts = self.parts(whole - bubble)
        parts |= {"bubble": bubble, "data": self.data, "optimizer": self.optimizer, "jitter": jitter}
        chip = self.cluster.chip
        spread = SPREAD["tested" if chip.generation in TESTED else "untested"]
        return Step(
            seconds=seconds,
            low=seconds / (1 + spread),
            high=seconds * (1 + spread),
            parts={name: value for name, value in parts.items() if value > 0},
            binds=binds(parts, seconds),
            tokens=self.batch * self.seq,
            chips=self.layout.chips,
            flops_per_token=cost.flops_per_token(self.config, self.seq),
            peak=chip.rate("bf16" if "bf16" in chip.figures else "fp16"),
        )

    def parts(self, busy: float) -> dict[str, float]:
        """Return the seconds of each part of the work of a pipeline, `busy` seconds in all.

        They are divided in the proportions of the stage that takes the longest.
        """
        stage = max(self.costs, key=lambda costs: costs.computing + costs.waiting)
        experts = sum(stage.experts)
        if self.layout.overlap or self.times.paired:
            experts = max(0.0, stage.paired - stage.computing)
        parts = {
            "compute": stage.computing - stage.again,
            "recompute": stage.again,
            "tensor": sum(stage.tensor),
            "context": sum(stage.context),
            "experts": experts,
            "data": sum(self.fetch(0)),
        }
        total = sum(parts.values())
        return {name: busy * value / total for name, value in parts.items()}


def binds(parts: dict[str, float], seconds: float) -> str:
    """Return the bottleneck with its share of the step: "all-to-all of experts: 31 % of the step".

    It is the largest part apart from computing, unless that part is small or computing takes most of the
    step.
    """
    others = [name for name in parts if name != "compute"]
    largest = max(others, key=lambda name: parts[name])
    share = parts[largest] / seconds
    if share < BINDING_SHARE or parts["compute"] > COMPUTING_SHARE * seconds:
        return f"computing: {parts['compute'] / seconds:.0%} of the step"
    return f"{WORDS[largest]}: {share:.0%} of the step"


def foresee(
    config: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    batch: int,
    seq: int,
    precision: str = "bf16",
    software: Software = TUNED,
    exact: bool = True,
) -> Foresight:
    """Return the forecast of a step of `batch` sequences of `seq` tokens.

    `exact` simulates the pipeline schedule; without it, formulas are used, which are fast enough for a
    search. Raises LimbeckError if the layout is impossible.
    """
    check(layout, config, cluster, batch)
    roof = Roofline(cluster.chip, precision, software)
    return Foresight(config, cluster, layout, batch, seq, roof, exact)
