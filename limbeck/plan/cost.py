"""What a model costs: multiply-adds and bytes of every layer, from the same `ModelConfig` that training uses.

A matrix product of `tokens` rows costs 2 x tokens x inputs x outputs FLOPs forward and twice that backward. FLOPs a token
are told under several conventions, because published figures use several; they differ by up to a third for the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from ..model.config import ModelConfig
from ..types import LimbeckError

# name -> what it counts; all but "hardware" leave recomputation out
CONVENTIONS = {
    "6n": "6 x parameters met, embeddings not counted twice (Kaplan et al. 2020)",
    "6N": "6 x all parameters, embeddings included; of a mixture those that a token meets",
    "causal": "6 x weights met without embeddings, and attention over half of the sequence (NVIDIA; DeepSeek's causal figure)",
    "non-causal": "the same with attention over the whole sequence (PaLM; DeepSeek's non-causal figure)",
    "megatron": "72 B s L h^2 (1 + s/6h + V/12Lh) a step (arXiv 2104.04473, section 5.1, without recomputation)",
    "hardware": "what chips compute: a second forward for every layer recomputed, attention over the whole sequence",
}


@dataclass(frozen=True)
class Matmul:
    """One matrix: `inputs` x `outputs`, met by `copies` of each token on average (8 of 256 experts: 8, and `experts`
    256). `split` says what tensor parallelism divides: "out", "in" or nothing."""

    name: str
    inputs: int
    outputs: int
    split: str = "out"
    copies: float = 1.0
    experts: int = 0

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * max(self.experts, 1)

    @property
    def met(self) -> float:
        return self.inputs * self.outputs * self.copies


@dataclass(frozen=True)
class Work:
    """One layer: its matrices, its attention, and the values a token that its other operations read and write.

    `wide` values are of the hidden size, and lie whole on each chip without sequence parallelism; `narrow` ones tensor
    parallelism divides. `kept` values are those that the backward pass needs.
    """

    matmuls: tuple[Matmul, ...]
    heads: int
    key: int
    value: int
    window: int
    wide: float
    narrow: float
    kept_wide: float
    kept_narrow: float
    routed: float = 0.0  # experts a token goes to
    experts: int = 0
    groups: int = 1  # nodes a token may go to, where routing is node-limited; 1 without limit
    hidden: int = 0

    @cached_property
    def weights(self) -> int:
        return sum(m.weights for m in self.matmuls)

    @cached_property
    def expert_weights(self) -> int:
        return sum(m.weights for m in self.matmuls if m.experts)

    @cached_property
    def flops(self) -> float:
        """Forward FLOPs a token, attention aside."""
        return 2 * sum(m.met for m in self.matmuls)

    def seen(self, seq: float, causal: bool = True) -> float:
        """Keys that a token sees on average in a sequence of `seq`."""
        if self.window and self.window < seq:
            return self.window
        return seq / 2 if causal else seq

    def attention_flops(self, seq: float, causal: bool = True) -> float:
        """Forward FLOPs a token of scores and mixing."""
        return 2 * self.heads * (self.key + self.value) * self.seen(seq, causal)


@cache
def work(config: ModelConfig) -> tuple[Work, ...]:
    """Every layer in order, those that predict further tokens last. The head is `head(config)`."""
    return tuple(_layer(config, layer) for layer in range(config.layers + config.predicted))


def head(config: ModelConfig) -> Matmul:
    return Matmul("head", config.hidden_size, config.vocab_size)


def weights(config: ModelConfig) -> int:
    """All weights, those that look ahead included."""
    return config.parameters + config.parameters_ahead


def flops_per_token(
    config: ModelConfig, seq: float, convention: str = "causal", recompute: float = 0.0
) -> float:
    """Training FLOPs a token by one of CONVENTIONS; `recompute` is the share of a forward pass done twice."""
    if convention not in CONVENTIONS:
        raise LimbeckError(f"no FLOPs convention {convention!r}; known are {', '.join(CONVENTIONS)}")
    layers = work(config)[: config.layers]
    met = sum(layer.flops for layer in layers) + 2 * head(config).met
    if convention == "6n":
        return 3 * met
    if convention == "6N":
        return 3 * met + 6 * config.vocab_size * config.hidden_size * (not config.tied)
    if convention == "megatron":
        size, depth = config.hidden_size, config.layers
        return 72 * depth * size**2 * (1 + seq / (6 * size) + config.vocab_size / (12 * depth * size))
    causal = convention == "causal"
    seen = sum(layer.attention_flops(seq, causal) for layer in layers)
    return (3 + recompute * (convention == "hardware")) * (met + seen)


def _layer(config: ModelConfig, layer: int) -> Work:
    mixed = config.sparse(layer)
    attention, key, value, kept = _attention(config, layer)
    ffn, middle, kept_ffn = _mixture(config) if mixed else _dense(config)
    hidden, experts = config.hidden_size, config.experts
    extra = (Matmul("join", 2 * hidden, hidden, "none"),) if layer >= config.layers else ()
    width = sum(m.outputs for m in attention if m.name in ("qkv", "q_up", "kv_up")) + config.heads * value
    return Work(
        matmuls=(*extra, *attention, *ffn),
        heads=config.heads,
        key=key,
        value=value,
        window=config.window(layer) if layer < config.layers else 0,
        wide=10.0 * hidden,  # two norms and two residual sums, read and written
        narrow=2.0 * width + middle,
        kept_wide=4.0 * hidden,  # inputs of two norms and of two matrices
        kept_narrow=kept + kept_ffn,
        routed=experts.top_k if mixed else 0.0,
        experts=experts.count if mixed else 0,
        groups=experts.top_groups if mixed and experts.groups > 1 else 1,
        hidden=hidden,
    )


def _attention(config: ModelConfig, layer: int) -> tuple[tuple[Matmul, ...], int, int, float]:
    """Matrices, sizes of a key and of a value, values kept a token."""
    hidden, heads = config.hidden_size, config.heads
    if latent := config.latent:
        key, value = latent.nope_dim + latent.rope_dim, latent.value_dim
        low = latent.q_rank
        asks = (
            (Matmul("q_down", hidden, low, "none"), Matmul("q_up", low, heads * key))
            if low
            else (Matmul("q_up", hidden, heads * key),)
        )
        down = Matmul("kv_down", hidden, latent.kv_rank + latent.rope_dim, "none")
        up = Matmul("kv_up", latent.kv_rank, heads * (latent.nope_dim + value))
        kept = low + latent.kv_rank + heads * (2 * key + 2 * value)
        return (*asks, down, up, Matmul("out", heads * value, hidden, "in")), key, value, kept
    queries, keys = heads * config.head_dim, config.kv_heads * config.head_dim * config.keeps(layer)
    kept = 2 * queries + 2 * config.kv_heads * config.head_dim
    return (
        (Matmul("qkv", hidden, queries + 2 * keys), Matmul("out", queries, hidden, "in")),
        config.head_dim,
        config.head_dim,
        kept,
    )


def _dense(config: ModelConfig) -> tuple[tuple[Matmul, ...], float, float]:
    hidden, middle = config.hidden_size, config.intermediate_size
    up = (1 + config.gated) * middle
    return (Matmul("up", hidden, up), Matmul("down", middle, hidden, "in")), up + middle, up + middle


def _mixture(config: ModelConfig) -> tuple[tuple[Matmul, ...], float, float]:
    hidden, experts = config.hidden_size, config.experts
    size, met = experts.intermediate_size, experts.top_k
    matmuls = [
        Matmul("router", hidden, experts.count, "none"),
        Matmul("experts_up", hidden, 2 * size, "out", met, experts.count),
        Matmul("experts_down", size, hidden, "in", met, experts.count),
    ]
    if experts.shared_size:
        matmuls += [
            Matmul("shared_up", hidden, 2 * experts.shared_size),
            Matmul("shared_down", experts.shared_size, hidden, "in"),
        ]
    values = (
        3.0 * (size * met + experts.shared_size) + 4.0 * met * hidden
    )  # and tokens put in order, and back
    return tuple(matmuls), values, 3.0 * (size * met + experts.shared_size) + met * hidden
