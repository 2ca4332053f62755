"""What one micro-batch costs in each stage of a pipeline: computing, and what waits for exchanges."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property

from ..model.config import ModelConfig
from . import collectives, cost
from .cluster import Cluster
from .collectives import Group, group
from .cost import Work
from .layout import Layout
from .roofline import Roofline, Split

LOGIT_BYTES = 20  # a logit's way through memory: 16 bits, float32 and its exponent, and back
EXCHANGING = (
    132 / 112
)  # DeepSeek-V3 gives 20 of 132 multiprocessors to all-to-all (arXiv 2412.19437, section 3.2.2)


@dataclass(frozen=True)
class Cost:
    """Seconds of one micro-batch in one stage (or layer): forward, backward, weight gradients; of exchanges that
    nothing hides: tensor and context parallelism, forward and backward; and of expert traffic both ways, which
    overlapping may hide."""

    forward: float = 0.0
    backward: float = 0.0
    weight: float = 0.0
    tensor: tuple[float, float] = (0.0, 0.0)
    context: tuple[float, float] = (0.0, 0.0)
    experts: tuple[float, float] = (0.0, 0.0)
    again: float = 0.0  # of `backward`: forward work done twice

    def __add__(self, other: Cost) -> Cost:
        def both(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
            return a[0] + b[0], a[1] + b[1]

        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.weight + other.weight,
            both(self.tensor, other.tensor),
            both(self.context, other.context),
            both(self.experts, other.experts),
            self.again + other.again,
        )

    def times(self, number: int) -> Cost:
        def both(pair: tuple[float, float]) -> tuple[float, float]:
            return number * pair[0], number * pair[1]

        return Cost(
            number * self.forward,
            number * self.backward,
            number * self.weight,
            both(self.tensor),
            both(self.context),
            both(self.experts),
            number * self.again,
        )

    @property
    def computing(self) -> float:
        return self.forward + self.backward + self.weight

    @property
    def waiting(self) -> float:
        return sum(self.tensor) + sum(self.context) + sum(self.experts)

    @property
    def ahead(self) -> float:
        """A lone forward pass: nothing hides its expert traffic."""
        return self.forward + self.tensor[0] + self.context[0] + self.experts[0]

    @property
    def back(self) -> float:
        return self.backward + self.tensor[1] + self.context[1] + self.experts[1]

    @property
    def paired(self) -> float:
        """A forward beside a backward: expert traffic of each hides behind the other's computing, which has fewer
        multiprocessors meanwhile."""
        fixed = sum(self.tensor) + sum(self.context)
        if not sum(self.experts):
            return self.computing + fixed
        return max(self.computing * EXCHANGING, sum(self.experts)) + fixed


@dataclass(frozen=True)
class Stages:
    """Stages of a model under a layout; `costs` one a stage, `layers` the layers of each."""

    config: ModelConfig
    cluster: Cluster
    layout: Layout
    seq: int
    roof: Roofline
    made: dict[tuple, Cost] = field(
        default_factory=dict, compare=False
    )  # layers costed already, over many layouts

    @cached_property
    def rows(self) -> float:
        return self.layout.micro * self.seq / self.layout.cp

    @cached_property
    def split(self) -> Split:
        at = self.layout
        return Split(self.rows, self.seq, at.tp, at.sp, at.cp, at.ep, at.experts_split)

    def group(self, size: int, stride: int = 1, rings: int = 0) -> Group:
        return group(self.cluster, size, stride, self.roof.numbers.links, self.cards, rings)

    @property
    def cards(self) -> float:
        """Share of its bandwidth that a card gives."""
        numbers = self.roof.numbers
        return numbers.efa if self.cluster.fabric.name.startswith("efa") else numbers.cards

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        return spread(self.config, self.count, self.roof.software.balanced)

    @property
    def count(self) -> int:
        return self.layout.stages

    @cached_property
    def works(self) -> tuple[Work, ...]:
        return cost.work(self.config)

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        at, sums = self.layout, []
        key = (at.tp, at.sp, at.cp, at.ep, at.expert_tp, at.micro, at.recompute)
        for stage, layers in enumerate(self.layers):
            total = Cost()
            for work, times in Counter(self.works[layer] for layer in layers).items():
                if (*key, work) not in self.made:
                    self.made[(*key, work)] = self._layer(work)
                total += self.made[(*key, work)].times(times)
            heads = (stage == self.count - 1) * (1 + self.config.predicted)
            sums.append(total + self._head(heads) if heads else total)
        return tuple(sums)

    def _head(self, times: int) -> Cost:
        tp, hidden, vocab = self.layout.tp, self.config.hidden_size, self.config.vocab_size
        passes = 1.0 if self.roof.software.fused else self.roof.numbers.passes
        logits = self.roof.copy(passes * LOGIT_BYTES / 2 * self.rows * vocab / tp)
        ahead = self.roof.matmul(self.rows, hidden, vocab / tp) + logits
        back = self.roof.matmul(self.rows, vocab / tp, hidden) + logits
        weight = self.roof.matmul(hidden, self.rows, vocab / tp)
        return Cost(times * ahead, times * back, times * weight)

    def _layer(self, work: Work) -> Cost:
        at, parts = self.layout, self.roof.layer(work, self.split)
        tensor, context, experts = self._tensor(work), self._context(work, parts.core), self._experts(work)
        again = self._again(parts)
        back = tensor[1] + (tensor[0] if at.recompute == "full" else 0.0)
        twice = experts[1] + (experts[0] if at.recompute == "full" else 0.0)
        return Cost(
            parts.forward,
            parts.backward + again,
            parts.weight,
            (tensor[0], back),
            context,
            (experts[0], twice),
            again,
        )

    def _again(self, parts) -> float:
        """Forward work done a second time in the backward pass."""
        mode = self.layout.recompute
        if mode == "full":
            return parts.forward
        if mode == "selective":
            return parts.core if self.roof.software.attention == "unfused" else 0.0
        if mode == "half":
            return (parts.forward - parts.core) / 2
        return parts.light if mode == "v3" else 0.0

    def _tensor(self, work: Work) -> tuple[float, float]:
        """Two sums of a layer's hidden states forward, two backward; weight gradients hide a part of the latter."""
        tp = self.layout.tp
        if tp == 1:
            return 0.0, 0.0
        sums = 2 if not work.experts or self.layout.experts_split > 1 else 1
        one = collectives.all_reduce(self.group(tp), 2 * self.rows * self.config.hidden_size)
        share = 0.5 if self.roof.software.hides_tensor else 1.0
        return share * sums * one, share * sums * one

    def _context(self, work: Work, core: float) -> tuple[float, float]:
        """Keys and values go round; attention hides them as far as it lasts."""
        cp = self.layout.cp
        if cp == 1:
            return 0.0, 0.0
        kept = 2 * self.config.kv_heads * self.config.head_dim / min(self.layout.tp, self.config.kv_heads)
        around = collectives.all_gather(
            self.group(cp, self.layout.tp), 2 * kept * self.layout.micro * self.seq
        )
        return max(0.0, around - core), max(0.0, 2 * around - 2.5 * core)

    def _experts(self, work: Work) -> tuple[float, float]:
        """Tokens to their experts and back: forward, and the same for gradients."""
        if not work.experts or self.layout.ep == 1:
            return 0.0, 0.0
        at = self.layout
        limit = work.groups if work.groups > 1 else 0
        way = collectives.all_to_all(
            self.group(at.ep, 1 if at.experts_split < at.tp else at.tp), work.routed, limit
        )
        tokens = self.rows / (at.tp // at.experts_split if at.experts_split < at.tp else 1)
        dispatch = 1.0 if self.roof.precision == "fp8" else 2.0
        out, home = way.seconds(tokens, work.hidden, dispatch, 2.0)
        return out + home, out + home


@cache
def spread(config: ModelConfig, stages: int, balanced: bool = False) -> tuple[tuple[int, ...], ...]:
    """Layers of each stage. Layers that divide evenly and are alike are dealt evenly; `balanced` software, and whoever
    has unequal layers, cuts where the dearest stage costs least, the head counted."""
    layers = cost.work(config)
    if stages == 1:
        return (tuple(range(len(layers))),)
    if len(layers) % stages == 0 and len(set(layers)) == 1 and not balanced:
        counts = [len(layers) // stages] * stages
    else:
        prices = [layer.flops for layer in layers]
        prices[-1] += 2 * cost.head(config).met * (1 + config.predicted)
        counts = _cut(prices, stages)
    firsts = [sum(counts[:stage]) for stage in range(stages)]
    return tuple(tuple(range(first, first + count)) for first, count in zip(firsts, counts, strict=True))


def _cut(prices: list[float], stages: int) -> list[int]:
    """Numbers of neighbours in each of so many pieces, such that the dearest piece is as cheap as can be."""
    low, high = max(prices), sum(prices)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if len(_pieces(prices, middle, stages)) <= stages else (middle, high)
    counts = _pieces(prices, high, stages)
    return counts + [0] * (stages - len(counts))


def _pieces(prices: list[float], most: float, stages: int) -> list[int]:
    """Greedy pieces of at most `most`, each leaving a layer for every stage to come."""
    counts, total = [0], 0.0
    for at, price in enumerate(prices):
        scarce = len(prices) - at <= stages - len(counts)
        if counts[-1] and (total + price > most * (1 + 1e-9) or scarce):
            counts, total = [*counts, 0], 0.0
        counts[-1] += 1
        total += price
    return counts
