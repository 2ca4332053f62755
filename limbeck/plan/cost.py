"""The cost of a model: FLOPs and values of every layer, from the `ModelConfig` that training uses.

A matrix product of `tokens` rows costs 2 x tokens x inputs x outputs FLOPs in the forward pass and twice that
in the backward pass. FLOPs a token are given under several conventions (`CONVENTIONS`), because published
figures use several; they differ by up to a third for the same run. A value is one number of an activation,
whatever its bytes. MTP layers are the extra layers of multi-token prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from ..model.config import ModelConfig
from ..types import LimbeckError

# name -> definition; all but "hardware" leave recomputation out
CONVENTIONS = {
    "6n": "6 x parameters met, embeddings not counted twice (Kaplan et al. 2020)",
    "6N": "6 x all parameters, embeddings included; of a mixture those that a token meets",
    "causal": "6 x weights met without embeddings, and attention over half of the sequence "
    "(NVIDIA; DeepSeek's causal figure)",
    "non-causal": "the same with attention over the whole sequence (PaLM; DeepSeek's non-causal figure)",
    "megatron": "72 B s L h^2 (1 + s/6h + V/12Lh) a step "
    "(arXiv 2104.04473, section 5.1, without recomputation)",
    "hardware": "what chips compute: a second forward for every layer recomputed, "
    "attention over the whole sequence",
}


@dataclass(frozen=True)
class Matmul:
    """One weight matrix of `inputs` x `outputs`, or the equal matrices of all experts of a layer.

    `experts` is the number of such experts (0: no experts), and `copies` the mean number of times that a
    token is multiplied with such a matrix: with 8 of 256 experts a token, `copies` is 8 and `experts` 256.
    `split` is the dimension that tensor parallelism divides: "out" (outputs), "in" (inputs) or "none".
    """

    name: str
    inputs: int
    outputs: int
    split: str = "out"
    copies: float = 1.0
    experts: int = 0

    @property
    def weights(self) -> int:
        """The number of weights, of all experts together."""
        return self.inputs * self.outputs * max(self.experts, 1)

    @property
    def met(self) -> float:
        """The number of weights that one token is multiplied with."""
        return self.inputs * self.outputs * self.copies


@dataclass(frozen=True)
class Work:
    """The work of one layer: its matrices, its attention, and the values of its other operations.

    `key` and `value` are the sizes of a key and a value of one head. `window` is the attention window in
    tokens (0: none). `wide`, `narrow`, `saved_wide` and `saved_narrow` count activation values a token. Wide
    values have the hidden size and, without sequence parallelism, are whole on each chip; narrow values are
    divided by tensor parallelism. Saved values are inputs of the backward pass.
    """

    matmuls: tuple[Matmul, ...]
    heads: int
    key: int
    value: int
    window: int
    wide: float
    narrow: float
    saved_wide: float
    saved_narrow: float
    routed: float = 0.0  # experts a token
    experts: int = 0
    groups: int = 1  # nodes of a token's experts, where routing is node-limited; 1 without limit
    hidden: int = 0

    @cached_property
    def weights(self) -> int:
        """The number of weights of the layer's matrices."""
        return sum(matmul.weights for matmul in self.matmuls)

    @cached_property
    def expert_weights(self) -> int:
        """The number of weights of the layer's routed experts."""
        return sum(matmul.weights for matmul in self.matmuls if matmul.experts)

    @cached_property
    def flops(self) -> float:
        """FLOPs of one token in the forward pass, without attention's scores and weighted sums."""
        return 2 * sum(matmul.met for matmul in self.matmuls)

    def seen(self, seq: float, causal: bool = True) -> float:
        """Return the number of keys that a token attends to on average in a sequence of `seq` tokens.

        With `causal` a token sees half of the sequence on average, otherwise all of it.
        """
        if self.window and self.window < seq:
            return self.window
        return seq / 2 if causal else seq

    def attention_flops(self, seq: float, causal: bool = True) -> float:
        """Return the forward FLOPs of one token for attention's scores and weighted sums of values.

        See `seen` for `seq` and `causal`.
        """
        return 2 * self.heads * (self.key + self.value) * self.seen(seq, causal)


@cache
def work(config: ModelConfig) -> tuple[Work, ...]:
    """Return the work of every layer in order, MTP layers last.

    The output matrix is not in it: see `head`.
    """
    layers = range(config.layers + config.predicted)
    return tuple(_layer(config, layer) for layer in layers)


def head(config: ModelConfig) -> Matmul:
    """Return the output matrix, which maps hidden states to logits."""
    return Matmul("head", config.hidden_size, config.vocab_size)


def weights(config: ModelConfig) -> int:
    """Return the number of all weights of the model, MTP layers included."""
    return config.parameters + config.parameters_ahead


def flops_per_token(
    config: ModelConfig, seq: float, convention: str = "causal", recompute: float = 0.0
) -> float:
    """Return the training FLOPs of one token under one of CONVENTIONS.

    `seq` is the tokens of a sequence. `recompute` is the share of the forward pass that the backward pass
    computes again; only the convention "hardware" counts it. Raises LimbeckError for an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise LimbeckError(f"no FLOPs convention {convention!r}; known are {', '.join(CONVENTIONS)}")
    if convention == "megatron":
        return _megatron_flops(config, seq)
    layers = work(config)[: config.layers]
    forward = sum(layer.flops for layer in layers) + 2 * head(config).met
    if convention == "6n":
        return 3 * forward
    if convention == "6N":
        embedding = 0 if config.tied else config.vocab_size * config.hidden_size
        return 3 * forward + 6 * embedding
    causal = convention == "causal"
    attention = sum(layer.attention_flops(seq, causal) for layer in layers)
    passes = 3 + recompute if convention == "hardware" else 3
    return passes * (forward + attention)


def _megatron_flops(config: ModelConfig, seq: float) -> float:
    """Return the training FLOPs of one token by Megatron's formula (arXiv 2104.04473, section 5.1)."""
    size = config.hidden_size
    depth = config.layers
    attention = seq / (6 * size)
    logits = config.vocab_size / (12 * depth * size)
    return 72 * depth * size**2 * (1 + attention + logits)


@dataclass(frozen=True)
class _Attention:
    """The attention of one layer: its matrices and the sizes of a key and of a value of one head.

    `saved` is the number of values a token that are kept for the backward pass.
    """

    matmuls: tuple[Matmul, ...]
    key: int
    value: int
    saved: float


@dataclass(frozen=True)
class _FeedForward:
    """The feed-forward network of one layer, dense or a mixture of experts.

    `values` is the number of activation values a token, and `saved` the number of those that are kept for the
    backward pass. `routed` of `experts` experts process a token, on at most `groups` nodes.
    """

    matmuls: tuple[Matmul, ...]
    values: float
    saved: float
    routed: float = 0.0
    experts: int = 0
    groups: int = 1


def _layer(config: ModelConfig, layer: int) -> Work:
    """Return the work of layer number `layer`.

    The numbers of MTP layers follow those of the model's own layers.
    """
    ahead = layer >= config.layers
    hidden = config.hidden_size
    attention = _attention(config, layer)
    network = _mixture(config) if config.sparse(layer) else _dense(config)
    join = (Matmul("join", 2 * hidden, hidden, "none"),) if ahead else ()
    projected = sum(m.outputs for m in attention.matmuls if m.name in ("qkv", "q_up", "kv_up"))
    width = projected + config.heads * attention.value
    return Work(
        matmuls=(*join, *attention.matmuls, *network.matmuls),
        heads=config.heads,
        key=attention.key,
        value=attention.value,
        window=0 if ahead else config.window(layer),
        wide=10.0 * hidden,  # two norms and two residual sums, read and written
        narrow=2.0 * width + network.values,
        saved_wide=4.0 * hidden,  # inputs of two norms and of two matrices
        saved_narrow=attention.saved + network.saved,
        routed=network.routed,
        experts=network.experts,
        groups=network.groups,
        hidden=hidden,
    )


def _attention(config: ModelConfig, layer: int) -> _Attention:
    """Return the attention of a layer: latent (MLA) if the model has it, else with key-value heads."""
    if config.latent:
        return _latent_attention(config)
    size = config.head_dim
    queries = config.heads * size
    keys = config.kv_heads * size * config.keeps(layer)  # 0 for a layer that uses another one's keys
    qkv = Matmul("qkv", config.hidden_size, queries + 2 * keys)
    out = Matmul("out", queries, config.hidden_size, "in")
    saved = 2 * queries + 2 * config.kv_heads * size
    return _Attention((qkv, out), size, size, saved)


def _latent_attention(config: ModelConfig) -> _Attention:
    """Return multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
    hidden = config.hidden_size
    heads = config.heads
    latent = config.latent
    key = latent.nope_dim + latent.rope_dim
    value = latent.value_dim
    rank = latent.q_rank
    if rank:
        queries = [Matmul("q_down", hidden, rank, "none"), Matmul("q_up", rank, heads * key)]
    else:
        queries = [Matmul("q_up", hidden, heads * key)]
    matmuls = (
        *queries,
        Matmul("kv_down", hidden, latent.kv_rank + latent.rope_dim, "none"),
        Matmul("kv_up", latent.kv_rank, heads * (latent.nope_dim + value)),
        Matmul("out", heads * value, hidden, "in"),
    )
    saved = rank + latent.kv_rank + heads * (2 * key + 2 * value)
    return _Attention(matmuls, key, value, saved)


def _dense(config: ModelConfig) -> _FeedForward:
    """Return a dense feed-forward network, gated or not."""
    hidden = config.hidden_size
    middle = config.intermediate_size
    up = (1 + config.gated) * middle
    matmuls = (Matmul("up", hidden, up), Matmul("down", middle, hidden, "in"))
    return _FeedForward(matmuls, up + middle, up + middle)


def _mixture(config: ModelConfig) -> _FeedForward:
    """Return a mixture of experts with its router and its shared experts."""
    hidden = config.hidden_size
    experts = config.experts
    size = experts.intermediate_size
    shared = experts.shared_size
    copies = experts.top_k
    matmuls = [
        Matmul("router", hidden, experts.count, "none"),
        Matmul("experts_up", hidden, 2 * size, "out", copies, experts.count),
        Matmul("experts_down", size, hidden, "in", copies, experts.count),
    ]
    if shared:
        matmuls.append(Matmul("shared_up", hidden, 2 * shared))
        matmuls.append(Matmul("shared_down", shared, hidden, "in"))
    inner = 3.0 * (size * copies + shared)
    return _FeedForward(
        tuple(matmuls),
        values=inner + 4.0 * copies * hidden,  # tokens are permuted to their experts, and back
        saved=inner + copies * hidden,
        routed=copies,
        experts=experts.count,
        groups=experts.top_groups if experts.groups > 1 else 1,
    )
