"""What it costs to answer: prefill and decoding apart, on chips of their own, and the price of a million tokens.

    decoding   a step is one token for each of `rows` conversations a chip: weights met and cache are read, products and
               attention computed, experts' tokens sent and fetched back; what is sent hides behind what is computed in part
    prefill    products and attention over whole prompts, experts' tokens to at most so many nodes
    busy       prompts come when they come: of what a benchmark reaches, nodes of prefill do a share in production

`day6` has DeepSeek's own account of a day (deepseek-ai/open-infra-index, day 6), to be reproduced exactly.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from ..model.config import ModelConfig
from ..types import LimbeckError
from . import collectives, cost
from .cluster import Cluster
from .roofline import Roofline, Split

MILLION = 1e6
# Fitted to the two profiles that DeepSeek published (deepseek-ai/profile-data: 7,839 tokens/s a chip of prefill on 32 H800,
# 2,324 of decoding on 128): the share of the shorter one of sending and computing that hides behind the other, and seconds of a
# layer of experts beside its products, in two half batches (gate, sorting, quantising, starting kernels).
OVERLAP = 0.75
EXPERT_LAYER = 330e-6
LAYER = 80e-6  # the same of a dense layer, in one batch: guessed
CARDS = 0.78  # of a card's bandwidth in low-latency exchanges: 39 of 50 GB/s (DeepEP README, EP128)
LINKS = 0.75  # of the scale-up link's
ROOM = 0.9  # of the memory that weights and cache may take
# Of what a benchmark reaches, what nodes of prefill did on DeepSeek's day (73.7k tokens/s with the cache's): fitted to that one
# figure. Decoding needs none: it waits for nobody, and more users only make it a little slower for each.
BUSY = 0.51


@dataclass(frozen=True)
class Rate:
    """Tokens a second of one chip, the seconds of one step, and what binds it: `Rate(2324, 0.055, "sending tokens to experts")`."""

    tokens: float
    seconds: float
    binds: str
    parts: dict[str, float]

    def node(self, chips: int = 8) -> float:
        return chips * self.tokens


@dataclass(frozen=True)
class Replica:
    """Chips that serve one copy of a model: experts spread over all of them, or every layer split (TP) where there are none.

    `Replica(config, cluster, 144, "fp8")` is V3's decoding unit of 18 nodes.
    """

    config: ModelConfig
    cluster: Cluster
    chips: int
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.chips > self.cluster.count:
            raise LimbeckError(f"serving on {self.chips} chips: {self.cluster.name} has {self.cluster.count}")
        if self.room <= 0:
            chip = self.cluster.chip
            raise LimbeckError(
                f"{self.config.parameters / 1e9:.1f}G weights in {self.precision} do not fit on {self.chips} x {chip.name} "
                f"of {chip.memory / 1e9:.0f} GB; serve on more chips, or in fewer bits"
            )

    @cached_property
    def layers(self) -> dict[cost.Work, int]:
        """Kinds of layers, and how many there are of each."""
        return dict(Counter(cost.work(self.config)[: self.config.layers]))

    @cached_property
    def roof(self) -> Roofline:
        return Roofline(self.cluster.chip, self.precision)

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 1 if self.precision in ("fp8", "int8") else 2

    @property
    def split(self) -> int:
        """Tensor parallelism: all chips of a dense model, none of a mixture (attention is copied, experts are spread)."""
        return 1 if self.config.experts else self.chips

    @property
    def held(self) -> float:
        """Bytes of weights on one chip; whole experts, one of them spare on each chip of a wide group."""
        table = self.config.vocab_size * self.config.hidden_size * (1 if self.config.tied else 2)
        rest = (sum(n * (w.weights - w.expert_weights) for w, n in self.layers.items()) + table) / self.split
        return self.width * (
            rest
            + sum(n * w.expert_weights / max(1, w.experts) * self.hosted(w) for w, n in self.layers.items())
        )

    def hosted(self, work: cost.Work) -> float:
        return -(-work.experts // self.chips) if work.experts else 0

    @property
    def room(self) -> float:
        """Bytes a chip has left for the cache."""
        return ROOM * self.cluster.chip.memory - self.held

    def most_rows(self, context: float) -> int:
        """Conversations of `context` tokens that fit beside the weights, for each chip."""
        return int(self.room / (self.cache(context) / self.split))

    def cache(self, context: float) -> float:
        """Bytes of one conversation's cache; 16 bits a value."""
        return self.config.kv_bytes_per_token(2) * context

    # ------------------------------------------------------------ decoding

    def decode(self, rows: float, context: float) -> Rate:
        """`rows` conversations a chip, each `context` tokens long."""
        roof, layers = self.roof, self.layers.items()
        share = rows * self.split  # tensor parallelism: every chip works on all conversations
        products = sum(n * self._products(roof, work, share) for work, n in layers)
        products += self._product(roof, share, self.config.hidden_size, self.config.vocab_size / self.split)
        core = self._core(roof, rows, context)
        sent = sum(n * self._exchange(work, rows) for work, n in layers)
        light = sum(n * (EXPERT_LAYER if work.experts else LAYER) for work, n in layers)
        busy = products + core + light
        seconds = max(busy, sent) + (1 - OVERLAP) * min(busy, sent) if self.config.experts else busy + sent
        parts = {
            "weights and products": products,
            "attention and cache": core,
            "sending tokens": sent,
            "the rest": light,
        }
        return Rate(rows / seconds, seconds, max(parts, key=parts.get), parts)

    def _products(self, roof: Roofline, work: cost.Work, rows: float) -> float:
        total = 0.0
        for m in work.matmuls:
            if m.experts:
                mine = self.hosted(work)
                total += mine * self._product(
                    roof, rows * m.copies * self.chips / m.experts, m.inputs, m.outputs
                )
            else:
                wide = self.split if m.split == "out" else 1
                deep = self.split if m.split == "in" else 1
                total += self._product(roof, rows, m.inputs / deep, m.outputs / wide)
        return total

    def _product(self, roof: Roofline, rows: float, inputs: float, outputs: float) -> float:
        """Few rows: bound by reading the weights, until there are enough to be bound by arithmetic."""
        return max(2 * rows * inputs * outputs / roof.peak, self.width * inputs * outputs / roof.memory)

    def _core(self, roof: Roofline, rows: float, context: float) -> float:
        """Scores and mixing of one new token: latent attention works on the latent itself, and so computes more than it reads."""
        c = self.config
        key, value = (
            (c.latent.kv_rank + c.latent.rope_dim, c.latent.kv_rank) if c.latent else (c.head_dim, c.head_dim)
        )
        seen = (
            sum(min(context, c.window(layer) or context) for layer in range(c.layers))
            if c.windows
            else c.layers * context
        )
        flops = 2 * rows * c.heads * (key + value) * seen
        bytes_ = rows * c.kv_bytes_per_token(2) * seen / c.layers
        return max(flops / roof.flash, bytes_ / roof.memory)

    def _exchange(self, work: cost.Work, rows: float, nodes: int = 0) -> float:
        """Experts: FP8 out and 16 bits back, each copy by itself, or once to each of at most so many nodes. Tensor parallelism:
        two sums a layer."""
        if work.experts and self.chips > 1:
            group = collectives.group(self.cluster, self.chips, links=LINKS, cards=CARDS)
            return sum(
                collectives.all_to_all(group, work.routed, nodes, once=nodes > 0).seconds(rows, work.hidden)
            )
        if self.split > 1:
            group = collectives.group(self.cluster, self.split, links=LINKS, cards=CARDS)
            return 2 * collectives.all_reduce(group, 2 * rows * self.split * work.hidden)
        return 0.0

    def at_speed(self, speed: float, context: float) -> tuple[float, Rate]:
        """The most conversations a chip that still get `speed` tokens a second each, and fit; with their rate."""
        low, high = 0.0, float(self.most_rows(context))
        if high < 1 or 1 / self.decode(1, context).seconds < speed:
            raise LimbeckError(
                f"no conversation gets {speed:g} tokens a second at {context:,.0f} tokens of context here; ask less, or take more chips"
            )
        if 1 / self.decode(high, context).seconds >= speed:
            return high, self.decode(high, context)
        low = 1.0
        for _ in range(40):
            rows = (low + high) / 2
            low, high = (rows, high) if 1 / self.decode(rows, context).seconds >= speed else (low, rows)
        return low, self.decode(low, context)

    # ------------------------------------------------------------ prefill

    def prefill(self, prompt: float, tokens: float = 16384) -> Rate:
        """Prompts of `prompt` tokens, `tokens` at once on each chip."""
        rows = tokens * self.split
        split = Split(rows, prompt, tp=self.split, ep=self.chips if self.config.experts else 1)
        computed = sum(n * self.roof.layer(work, split).forward for work, n in self.layers.items())
        sent = sum(n * self._exchange(work, tokens, work.groups) for work, n in self.layers.items())
        seconds = (
            max(computed, sent) + (1 - OVERLAP) * min(computed, sent)
            if self.config.experts
            else computed + sent
        )
        parts = {"products and attention": computed, "sending tokens": sent}
        return Rate(tokens / seconds, seconds, max(parts, key=parts.get), parts)


@dataclass(frozen=True)
class Cost:
    """Dollars for a million tokens: read anew, read from the cache, written."""

    input: float
    cached: float
    output: float


def unit_cost(node_price: float, input_rate: float, output_rate: float) -> tuple[float, float]:
    """Dollars for a million input and output tokens of nodes at `node_price` an hour: (0.060, 0.300) for day 6."""
    return tuple(node_price / 3600 / rate * MILLION for rate in (input_rate, output_rate))


def production(prefill: Rate, decode: Rate, hits: float, chips: int = 8) -> tuple[float, float]:
    """Tokens a second of a node in production, input with what the cache held, and output."""
    return BUSY * prefill.node(chips) / (1 - hits), decode.node(chips)


# ---------------------------------------------------------------- DeepSeek's day


@dataclass(frozen=True)
class Day:
    """A day of serving (deepseek-ai/open-infra-index, day 6, 2025-02-28): tokens, nodes, rates, prices."""

    cached: float = 342e9
    fresh: float = 266e9
    output: float = 168e9
    nodes: float = 226.75
    chips: int = 8
    chip_price: float = 2.0
    input_rate: float = 73.7e3
    output_rate: float = 14.8e3
    prices: tuple[float, float, float] = (0.14, 0.55, 2.19)

    @property
    def hits(self) -> float:
        return self.cached / (self.cached + self.fresh)

    @property
    def cost(self) -> float:
        """Dollars for the nodes: 87,072."""
        return self.nodes * self.chips * 24 * self.chip_price

    @property
    def revenue(self) -> float:
        """Dollars, were all tokens sold at R1's prices: 562,100 (562,027 before rounding the tokens)."""
        tokens = (self.cached, self.fresh, self.output)
        return sum(price * count for price, count in zip(self.prices, tokens, strict=True)) / MILLION

    @property
    def margin(self) -> float:
        """Revenue over cost, less one: 5.45."""
        return self.revenue / self.cost - 1

    @property
    def nodes_needed(self) -> tuple[float, float]:
        """Prefill and decoding nodes that its rates ask for: 95.5 and 131.4, together the 226.75 that ran."""
        return (self.cached + self.fresh) / 86400 / self.input_rate, self.output / 86400 / self.output_rate
