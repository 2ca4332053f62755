"""The cost of serving: prefill and decoding on chips of their own, and the price of a million tokens.

    decoding   a step is one token for each of `rows` conversations a chip: weights and cache are read,
               products and attention computed, experts' tokens sent and fetched; part of this is hidden
    prefill    products and attention over whole prompts, experts' tokens to a limited number of nodes
    busy       prompts arrive at any time: prefill nodes in production reach a share of their benchmark

A row is one conversation that is being decoded; the cache is its KV cache. `Day` has DeepSeek's own account
of a day (deepseek-ai/open-infra-index, day 6), whose totals it reproduces exactly.
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

MILLION = 1e6  # tokens that a price is for
DAY = 86400  # seconds
# OVERLAP and EXPERT_LAYER are fitted to the two profiles that DeepSeek published (deepseek-ai/profile-data:
# 7,839 tokens/s a chip of prefill on 32 H800, 2,324 of decoding on 128).
OVERLAP = 0.75  # share of the shorter one of sending and computing that hides behind the longer one
# seconds of a layer of experts beside its products: gate, sorting, quantising, launches
EXPERT_LAYER = 330e-6
LAYER = 80e-6  # seconds of a dense layer beside its products: guessed
CARDS = 0.78  # share of a card's bandwidth in low-latency exchanges: 39 of 50 GB/s (DeepEP README, EP128)
LINKS = 0.75  # share of the scale-up link's bandwidth
ROOM = 0.9  # share of the memory that weights and cache may take
# Share of the benchmark that prefill nodes reached on DeepSeek's day (73.7k tokens/s with cached tokens):
# fitted to that one figure. Decoding needs none: it never waits for prompts.
BUSY = 0.51
SEARCH_STEPS = 40  # halvings of the interval of rows


@dataclass(frozen=True)
class Rate:
    """The speed of one chip in prefill or decoding: `Rate(2324, 0.055, "sending tokens", {...})`.

    `tokens` is tokens a second of one chip, `seconds` the time of one step, `parts` the seconds of its parts,
    and `binds` the name of the longest part.
    """

    tokens: float
    seconds: float
    binds: str
    parts: dict[str, float]

    def node(self, chips: int = 8) -> float:
        """Return the tokens a second of a node of `chips` chips."""
        return chips * self.tokens


@dataclass(frozen=True)
class Replica:
    """The chips that serve one copy of a model.

    `Replica(config, cluster, 144, "fp8")` is DeepSeek-V3's decoding unit. Experts are spread over all chips;
    the layers of a model without experts are split over them by tensor parallelism. Raises LimbeckError if
    the cluster has too few chips, or if the weights do not fit.
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
                f"{self.config.parameters / 1e9:.1f}G weights in {self.precision} do not fit on "
                f"{self.chips} x {chip.name} of {chip.memory / 1e9:.0f} GB; "
                "serve on more chips, or in fewer bits"
            )

    @cached_property
    def layers(self) -> dict[cost.Work, int]:
        """The different layers of the model, each with the number of times that it occurs."""
        works = cost.work(self.config)[: self.config.layers]
        return dict(Counter(works))

    @cached_property
    def roof(self) -> Roofline:
        """The roofline model of one chip."""
        return Roofline(self.cluster.chip, self.precision)

    @property
    def width(self) -> int:
        """Bytes of a weight in this precision."""
        return {"fp8": 1, "int8": 1, "fp32": 4}.get(self.precision, 2)

    @property
    def cached(self) -> float:
        """Bytes of KV cache of one token, at 16 bits a value, or 32 where weights have 32."""
        return self.config.kv_bytes_per_token(max(2, self.width))

    @property
    def split(self) -> int:
        """The degree of tensor parallelism: all chips for a dense model.

        It is 1 for a mixture of experts, whose attention is replicated on every chip.
        """
        return 1 if self.config.experts else self.chips

    @property
    def held(self) -> float:
        """Bytes of weights on one chip.

        A chip holds whole experts, as many as `hosted` says, so that there may be spare copies.
        """
        tables = 1 if self.config.tied else 2
        embeddings = tables * self.config.vocab_size * self.config.hidden_size
        shared = experts = 0
        for work, count in self.layers.items():
            shared += count * (work.weights - work.expert_weights)
            experts += count * work.expert_weights / max(1, work.experts) * self.hosted(work)
        return self.width * ((shared + embeddings) / self.split + experts)

    def hosted(self, work: cost.Work) -> float:
        """Return the number of experts of a layer on one chip, rounded up; 0 for a dense layer."""
        return -(-work.experts // self.chips) if work.experts else 0

    @property
    def room(self) -> float:
        """Bytes of one chip's memory that are left for the KV cache."""
        return ROOM * self.cluster.chip.memory - self.held

    def most_rows(self, context: float) -> int:
        """Return how many conversations of `context` tokens fit on one chip beside the weights.

        The chip holds 1/`split` of each conversation's KV cache.
        """
        return int(self.room / (self.cache(context) / self.split))

    def cache(self, context: float) -> float:
        """Return the bytes of one conversation's KV cache of `context` tokens."""
        return self.cached * context

    # ------------------------------------------------------------ decoding

    def decode(self, rows: float, context: float) -> Rate:
        """Return the rate of decoding `rows` conversations a chip.

        The context of each conversation is `context` tokens long.
        """
        all_rows = rows * self.split  # in tensor parallelism every chip computes for all conversations
        products = sent = light = 0.0
        for work, count in self.layers.items():
            products += count * self._products(work, all_rows)
            sent += count * self._exchange(work, rows)
            light += count * (EXPERT_LAYER if work.experts else LAYER)
        products += self._product(all_rows, self.config.hidden_size, self.config.vocab_size / self.split)
        attention = self._attention(rows, context)
        seconds = self._overlapped(products + attention + light, sent)
        parts = {
            "weights and products": products,
            "attention and cache": attention,
            "sending tokens": sent,
            "the rest": light,
        }
        return Rate(rows / seconds, seconds, max(parts, key=parts.get), parts)

    def _overlapped(self, computed: float, sent: float) -> float:
        """Return the seconds of computing and sending together.

        With experts, the share OVERLAP of the shorter one is hidden behind the longer one; otherwise they add
        up.
        """
        if not self.config.experts:
            return computed + sent
        return max(computed, sent) + (1 - OVERLAP) * min(computed, sent)

    def _products(self, work: cost.Work, rows: float) -> float:
        """Return the seconds of a layer's matrix products on `rows` tokens."""
        total = 0.0
        for matmul in work.matmuls:
            if matmul.experts:
                expert_rows = rows * matmul.copies * self.chips / matmul.experts
                seconds = self._product(expert_rows, matmul.inputs, matmul.outputs)
                total += self.hosted(work) * seconds
            else:
                outputs = matmul.outputs / (self.split if matmul.split == "out" else 1)
                inputs = matmul.inputs / (self.split if matmul.split == "in" else 1)
                total += self._product(rows, inputs, outputs)
        return total

    def _product(self, rows: float, inputs: float, outputs: float) -> float:
        """Return the seconds of one matrix product [rows, inputs] x [inputs, outputs].

        With few rows, reading the weights takes the longest; with many, the arithmetic.
        """
        computing = 2 * rows * inputs * outputs / self.roof.peak
        reading = self.width * inputs * outputs / self.roof.memory
        return max(computing, reading)

    def _attention(self, rows: float, context: float) -> float:
        """Return the seconds of attention in all layers for one new token of each conversation.

        There are `rows` conversations a chip, of `context` tokens each. Latent attention (MLA) works on the
        latent vectors themselves, without expanding them to keys and values.
        """
        config = self.config
        key = value = config.head_dim
        if config.latent:
            key = config.latent.kv_rank + config.latent.rope_dim
            value = config.latent.kv_rank
        attended = config.layers * context
        if config.windows:
            attended = sum(min(context, config.window(layer) or context) for layer in range(config.layers))
        flops = 2 * rows * config.heads * (key + value) * attended
        cache_bytes = rows * self.cached * attended / config.layers
        return max(flops / self.roof.flash, cache_bytes / self.roof.memory)

    def _exchange(self, work: cost.Work, rows: float, nodes: int = 0) -> float:
        """Return the seconds of communication of one layer, with `rows` tokens a chip.

        Expert parallelism sends FP8 values to the experts and gets 16-bit values back: a copy for each
        expert, or, if `nodes` is given, one copy to each of at most `nodes` nodes. Tensor parallelism takes
        two all-reduces.
        """
        if work.experts and self.chips > 1:
            group = collectives.group(self.cluster, self.chips, links=LINKS, cards=CARDS)
            exchange = collectives.all_to_all(group, work.routed, nodes, once=nodes > 0)
            return sum(exchange.seconds(rows, work.hidden))
        if self.split > 1:
            group = collectives.group(self.cluster, self.split, links=LINKS, cards=CARDS)
            return 2 * collectives.all_reduce(group, 2 * rows * self.split * work.hidden)
        return 0.0

    def at_speed(self, speed: float, context: float) -> tuple[float, Rate]:
        """Return the most conversations a chip that get `speed` tokens a second each, and their rate.

        The conversations have `context` tokens and fit in memory. Raises LimbeckError if not even one
        conversation gets this speed.
        """

        def is_fast(rows: float) -> bool:
            return 1 / self.decode(rows, context).seconds >= speed

        high = float(self.most_rows(context))
        if high < 1 or not is_fast(1):
            raise LimbeckError(
                f"no conversation gets {speed:g} tokens a second at {context:,.0f} tokens of context here; "
                "ask less, or take more chips"
            )
        if is_fast(high):
            return high, self.decode(high, context)
        low = 1.0
        for _ in range(SEARCH_STEPS):
            middle = (low + high) / 2
            if is_fast(middle):
                low = middle
            else:
                high = middle
        return low, self.decode(low, context)

    # ------------------------------------------------------------ prefill

    def prefill(self, prompt: float, tokens: float = 16384) -> Rate:
        """Return the rate of prefill of prompts of `prompt` tokens.

        Each chip processes `tokens` tokens at once.
        """
        experts = self.chips if self.config.experts else 1
        split = Split(tokens * self.split, prompt, tp=self.split, ep=experts)
        computed = sent = 0.0
        for work, count in self.layers.items():
            computed += count * self.roof.layer(work, split).forward
            sent += count * self._exchange(work, tokens, work.groups)
        seconds = self._overlapped(computed, sent)
        parts = {"products and attention": computed, "sending tokens": sent}
        return Rate(tokens / seconds, seconds, max(parts, key=parts.get), parts)


def unit_cost(node_price: float, input_rate: float, output_rate: float) -> tuple[float, float]:
    """Return the dollars for a million input tokens and for a million output tokens.

    A node costs `node_price` dollars an hour and handles `input_rate` or `output_rate` tokens a second.
    """
    second = node_price / 3600
    return second / input_rate * MILLION, second / output_rate * MILLION


def production(prefill: Rate, decode: Rate, hits: float, chips: int = 8) -> tuple[float, float]:
    """Return the input tokens and the output tokens a second of a node in production.

    `hits` is the share of input tokens found in the cache, which need no prefill; `chips` is the chips of a
    node.
    """
    return BUSY * prefill.node(chips) / (1 - hits), decode.node(chips)


# ---------------------------------------------------------------- DeepSeek's day


@dataclass(frozen=True)
class Day:
    """A day of DeepSeek's serving (deepseek-ai/open-infra-index, day 6, 2025-02-28).

    `cached`, `fresh` and `output` are the day's tokens: input from the cache, other input, and output.
    `nodes` is the mean number of nodes in use; `chip_price` is dollars an hour; the rates are tokens a second
    of a node; `prices` are dollars for a million tokens, in the order of the three counts.
    """

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
        """The share of input tokens that were found in the cache."""
        return self.cached / (self.cached + self.fresh)

    @property
    def cost(self) -> float:
        """Dollars for renting the nodes for the day: 87,072."""
        return self.nodes * self.chips * 24 * self.chip_price

    @property
    def revenue(self) -> float:
        """Dollars for all tokens at the prices of R1: 562,100 (562,027 before rounding the tokens)."""
        tokens = (self.cached, self.fresh, self.output)
        return sum(price * count for price, count in zip(self.prices, tokens, strict=True)) / MILLION

    @property
    def margin(self) -> float:
        """Revenue over cost, less one: 5.45, a profit of 545 % of the cost."""
        return self.revenue / self.cost - 1

    @property
    def nodes_needed(self) -> tuple[float, float]:
        """The nodes needed for prefill and for decoding at the day's rates: 95.5 and 131.4.

        Together they are close to the 226.75 nodes that ran.
        """
        prefill = (self.cached + self.fresh) / DAY / self.input_rate
        decode = self.output / DAY / self.output_rate
        return prefill, decode
