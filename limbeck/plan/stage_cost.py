"""The cost of one micro-batch in each stage of a pipeline: computing, and exposed exchanges.

An exchange is communication between chips; exposed means not hidden behind computing. A stage is one of the
pieces that the layers of the model are cut into.
"""

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
from .roofline import Parts, Roofline, Split

LOGIT_BYTES = 20  # a logit through memory: 16 bits, float32 and its exponent, and back
# factor on computing time beside an exchange: DeepSeek-V3 gives 20 of 132 multiprocessors to all-to-all
# (arXiv 2412.19437, section 3.2.2)
EXCHANGING = 132 / 112
BACKWARD_ATTENTION = 2.5  # times the forward seconds of attention's core
BISECTIONS = 40  # steps of the search for the cheapest cut
ROUNDING = 1 + 1e-9  # times the limit: a stage may exceed it by rounding

Pair = tuple[float, float]  # seconds of the forward pass, and of the backward pass


@dataclass(frozen=True)
class Cost:
    """Seconds of one micro-batch in one stage (or layer).

    `forward`, `backward` and `weight` are computing: the forward pass, the gradients of inputs and the
    gradients of weights. `tensor` and `context` are the exposed exchanges of tensor and context parallelism,
    in the forward and in the backward pass. `experts` is the traffic of tokens to their experts, which
    overlapping may hide.
    """

    forward: float = 0.0
    backward: float = 0.0
    weight: float = 0.0
    tensor: Pair = (0.0, 0.0)
    context: Pair = (0.0, 0.0)
    experts: Pair = (0.0, 0.0)
    again: float = 0.0  # the part of `backward` that recomputes

    def __add__(self, other: Cost) -> Cost:
        """Return the sum of both costs, field by field."""
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.weight + other.weight,
            _add(self.tensor, other.tensor),
            _add(self.context, other.context),
            _add(self.experts, other.experts),
            self.again + other.again,
        )

    def times(self, number: int) -> Cost:
        """Return the cost of `number` equal layers."""
        return Cost(
            number * self.forward,
            number * self.backward,
            number * self.weight,
            _scale(self.tensor, number),
            _scale(self.context, number),
            _scale(self.experts, number),
            number * self.again,
        )

    @property
    def computing(self) -> float:
        """Seconds of computing: forward, backward and weight gradients."""
        return self.forward + self.backward + self.weight

    @property
    def waiting(self) -> float:
        """Seconds of exchanges if nothing hides the expert traffic."""
        return sum(self.tensor) + sum(self.context) + sum(self.experts)

    @property
    def ahead(self) -> float:
        """Seconds of a forward pass that overlaps with nothing, so that its expert traffic is exposed."""
        return self.forward + self.tensor[0] + self.context[0] + self.experts[0]

    @property
    def back(self) -> float:
        """Seconds of a backward pass that overlaps with nothing, without weight gradients."""
        return self.backward + self.tensor[1] + self.context[1] + self.experts[1]

    @property
    def paired(self) -> float:
        """Seconds of a forward pass overlapped with a whole backward pass.

        The expert traffic of each hides behind the other's computing, which is slower meanwhile, because some
        of the multiprocessors do the exchange.
        """
        fixed = sum(self.tensor) + sum(self.context)
        traffic = sum(self.experts)
        if not traffic:
            return self.computing + fixed
        return max(self.computing * EXCHANGING, traffic) + fixed


def _add(a: Pair, b: Pair) -> Pair:
    """Return the sum of two pairs of seconds, forward and backward."""
    return a[0] + b[0], a[1] + b[1]


def _scale(pair: Pair, number: float) -> Pair:
    """Return `number` times a pair of seconds, forward and backward."""
    return number * pair[0], number * pair[1]


@dataclass(frozen=True)
class Stages:
    """The stages of a model under a layout.

    `costs` has the cost of each stage, and `layers` the layers of each stage. `seq` is the tokens of a
    sequence.
    """

    config: ModelConfig
    cluster: Cluster
    layout: Layout
    seq: int
    roof: Roofline
    made: dict[tuple, Cost] = field(default_factory=dict, compare=False)  # costs of layers, over many layouts

    @cached_property
    def rows(self) -> float:
        """The tokens of a micro-batch on one chip."""
        return self.layout.micro * self.seq / self.layout.cp

    @cached_property
    def split(self) -> Split:
        """One chip's share of a layer."""
        at = self.layout
        return Split(self.rows, self.seq, at.tp, at.sp, at.cp, at.ep, at.experts_split)

    def group(self, size: int, stride: int = 1, rings: int = 0) -> Group:
        """Return a group of `size` chips that are `stride` apart.

        It has the fitted efficiency of links and network cards. `rings` is the number of rings between nodes
        (0: as many as there are cards).
        """
        return group(self.cluster, size, stride, self.roof.numbers.links, self.cards, rings)

    @property
    def cards(self) -> float:
        """The share of its bandwidth that a network card reaches."""
        numbers = self.roof.numbers
        return numbers.efa if self.cluster.fabric.name.startswith("efa") else numbers.cards

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the layers of each stage."""
        return spread(self.config, self.count, self.roof.software.balanced)

    @property
    def count(self) -> int:
        """The number of stages of the pipeline."""
        return self.layout.stages

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """The work of each layer of the model, MTP layers included."""
        return cost.work(self.config)

    @cached_property
    def costs(self) -> tuple[Cost, ...]:
        """The cost of one micro-batch in each stage."""
        costs = []
        for stage, layers in enumerate(self.layers):
            total = Cost()
            for work, number in Counter(self.works[layer] for layer in layers).items():
                total += self._cached_layer(work).times(number)
            if stage == self.count - 1:
                total += self._head(1 + self.config.predicted)
            costs.append(total)
        return tuple(costs)

    def _head(self, times: int) -> Cost:
        """Return the cost of the output matrix with the loss, computed `times` times for each token."""
        roof = self.roof
        hidden = self.config.hidden_size
        vocab = self.config.vocab_size / self.layout.tp
        passes = 1.0 if roof.software.fused else roof.numbers.passes
        logits = roof.copy(passes * LOGIT_BYTES / 2 * self.rows * self.config.vocab_size / self.layout.tp)
        ahead = roof.matmul(self.rows, hidden, vocab) + logits
        back = roof.matmul(self.rows, vocab, hidden) + logits
        weight = roof.matmul(hidden, self.rows, vocab)
        return Cost(times * ahead, times * back, times * weight)

    def _cached_layer(self, work: Work) -> Cost:
        """Return the cost of a layer, from the cache `made` if it is there."""
        at = self.layout
        key = (at.tp, at.sp, at.cp, at.ep, at.expert_tp, at.micro, at.recompute, work)
        if key not in self.made:
            self.made[key] = self._layer(work)
        return self.made[key]

    def _layer(self, work: Work) -> Cost:
        """Return the cost of a layer."""
        parts = self.roof.layer(work, self.split)
        again = self._again(parts)
        return Cost(
            parts.forward,
            parts.backward + again,
            parts.weight,
            self._recomputed(self._tensor(work)),
            self._context(parts.core),
            self._recomputed(self._experts(work)),
            again,
        )

    def _recomputed(self, seconds: float) -> Pair:
        """Return the forward and the backward seconds of an exchange.

        With full recomputation, the backward pass repeats the exchange of the forward pass.
        """
        again = seconds if self.layout.recompute == "full" else 0.0
        return seconds, seconds + again

    def _again(self, parts: Parts) -> float:
        """Return the seconds of the forward computation that the backward pass repeats."""
        mode = self.layout.recompute
        if mode == "full":
            return parts.forward
        if mode == "selective":
            return parts.core if self.roof.software.attention == "unfused" else 0.0
        if mode == "half":
            return (parts.forward - parts.core) / 2
        return parts.light if mode == "v3" else 0.0

    def _tensor(self, work: Work) -> float:
        """Return the exposed seconds of tensor parallelism in one layer, in one direction.

        There are two all-reduces of the layer's hidden states, or one if experts are not divided. Software
        that hides tensor parallelism hides half of the time.
        """
        tp = self.layout.tp
        if tp == 1:
            return 0.0
        sums = 2 if not work.experts or self.layout.experts_split > 1 else 1
        one = collectives.all_reduce(self.group(tp), 2 * self.rows * self.config.hidden_size)
        share = 0.5 if self.roof.software.hides_tensor else 1.0
        return share * sums * one

    def _context(self, core: float) -> Pair:
        """Return the exposed seconds of context parallelism, forward and backward.

        Keys and values are passed around while attention computes for `core` seconds, which hides as much.
        """
        at = self.layout
        if at.cp == 1:
            return 0.0, 0.0
        kv_heads = self.config.kv_heads
        values = 2 * kv_heads * self.config.head_dim / min(at.tp, kv_heads)
        around = collectives.all_gather(self.group(at.cp, at.tp), 2 * values * at.micro * self.seq)
        return max(0.0, around - core), max(0.0, 2 * around - BACKWARD_ATTENTION * core)

    def _experts(self, work: Work) -> float:
        """Return the seconds of sending tokens to their experts and returning the outputs.

        The forward and the backward pass each take this long.
        """
        at = self.layout
        if not work.experts or at.ep == 1:
            return 0.0
        limit = work.groups if work.groups > 1 else 0
        whole = at.experts_split < at.tp  # each chip then sends a part of the tokens
        chips = self.group(at.ep, 1 if whole else at.tp)
        way = collectives.all_to_all(chips, work.routed, limit)
        tokens = self.rows / (at.tp // at.experts_split if whole else 1)
        dispatch = 1.0 if self.roof.precision == "fp8" else 2.0
        return sum(way.seconds(tokens, work.hidden, dispatch, 2.0))


@cache
def spread(config: ModelConfig, stages: int, balanced: bool = False) -> tuple[tuple[int, ...], ...]:
    """Return the indices of the layers of each stage.

    Equal layers that divide evenly over the stages are dealt evenly. If layers are unequal or do not divide,
    or if the software is `balanced`, they are cut such that the most expensive stage is as cheap as possible;
    the output matrix counts as part of the last layer.
    """
    layers = cost.work(config)
    if stages == 1:
        return (tuple(range(len(layers))),)
    if len(layers) % stages == 0 and len(set(layers)) == 1 and not balanced:
        counts = [len(layers) // stages] * stages
    else:
        prices = [layer.flops for layer in layers]
        prices[-1] += 2 * cost.head(config).met * (1 + config.predicted)
        counts = _cut(prices, stages)
    first = 0
    cut = []
    for count in counts:
        cut.append(tuple(range(first, first + count)))
        first += count
    return tuple(cut)


def _cut(prices: list[float], stages: int) -> list[int]:
    """Cut the layers into at most `stages` consecutive runs, and return the number of layers in each.

    The most expensive run is as cheap as possible; `prices` has the cost of each layer. Missing runs have
    length 0.
    """
    low = max(prices)
    high = sum(prices)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if len(_runs(prices, middle, stages)) <= stages:
            high = middle
        else:
            low = middle
    counts = _runs(prices, high, stages)
    return counts + [0] * (stages - len(counts))


def _runs(prices: list[float], most: float, stages: int) -> list[int]:
    """Return the lengths of consecutive runs of layers that are filled up to a price of `most` each.

    Each run leaves at least one layer for every later stage, of `stages` in all.
    """
    counts = [0]
    total = 0.0
    for at, price in enumerate(prices):
        scarce = len(prices) - at <= stages - len(counts)
        if counts[-1] and (scarce or total + price > most * ROUNDING):
            counts.append(0)
            total = 0.0
        counts[-1] += 1
        total += price
    return counts
