"""The architecture of a model, and the sizes and costs that follow from it. Does not import torch.

Attention and feed-forward are chosen layer by layer: `latent` turns attention into multi-head latent
attention (MLA), `experts` replaces the feed-forward of all layers but `experts.dense` by a mixture of
experts, `windows` limits how many positions a layer sees. `hf_config.py` reads and writes HuggingFace's
`config.json`. Layers are numbered from 0; the modules of multi-token prediction (MTP) have the numbers after
the last layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..types import LimbeckError
from .families import LATENT


@dataclass(frozen=True)
class Latent:
    """The sizes of multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1).

    DeepSeek-V3's are `Latent(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, q_rank=1536)`. `kv_rank`
    and `q_rank` are the widths of the latents of keys and values and of queries; a `q_rank` of 0 means that
    queries are projected directly, without a latent. Each head's query and key have `nope_dim` dimensions
    without rotary positions and `rope_dim` with them; its value has `value_dim`. `interleaved` is True if the
    checkpoint stores the rotary dimensions as neighbouring pairs.
    """

    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int = 0
    interleaved: bool = True

    @property
    def key_dim(self) -> int:
        """The dimensions of one head's query or key: those without rotary positions and those with them."""
        return self.nope_dim + self.rope_dim

    @property
    def cached(self) -> int:
        """The number of values cached for one token in one layer: the latent and the rotated key."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class Experts:
    """The sizes and switches of a mixture of experts.

    DeepSeek-V3's are `Experts(count=256, top_k=8, intermediate_size=2048, shared_size=2048, sigmoid=True,
    balanced=True, normalize=True, scale=2.5, groups=8, top_groups=4, dense=(0, 1, 2))`.

    `count` is the number of routed experts, `top_k` of which each token uses; `intermediate_size` is the
    width of one of them and `shared_size` the width of all shared experts together. Router scores are
    sigmoids with `sigmoid`, otherwise a softmax. `balanced` adds a bias to the scores for the choice of
    experts, but not for the weights of their outputs. `normalize` makes the weights of the chosen experts sum
    to one; `scale` multiplies these weights afterwards. `groups` is the number of equal groups of experts,
    and each token chooses only among the experts of its best `top_groups` groups. `dense` lists the layers
    without a mixture. In training, `capacity` limits the tokens of one expert to that multiple of the even
    load; tokens beyond the limit are moved to experts with room. 0 means no limit.
    """

    count: int
    top_k: int
    intermediate_size: int
    shared_size: int = 0
    sigmoid: bool = False
    balanced: bool = False
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    dense: tuple[int, ...] = ()
    capacity: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder.

    `ModelConfig("llama", vocab_size=48, hidden_size=64, layers=3, heads=4, kv_heads=2, head_dim=16,
    intermediate_size=176)` is a model of 130 thousand parameters.

    `family` is a key of `families.FAMILIES`. `tied` means that the output head is the embedding matrix.
    `qk_norm` normalises the heads of queries and keys "before" or "after" their rotation, or not at all if it
    is empty. `rope_scaling` has the keys of `config.json`; it is empty without scaling. `max_positions` is
    the longest sequence in tokens. `windows[i]` is the number of positions that layer i sees (0, or no entry:
    all). With `share_kv` n, each group of n neighbouring layers uses the keys and values of its first layer
    (cross-layer attention, CLA). `predicted` is the number of modules for multi-token prediction.
    `layer_norm` uses LayerNorm in place of RMSNorm, `parallel` computes attention and feed-forward from the
    same input, and without `gated` the feed-forward is a plain GELU network in place of SwiGLU. Gemma 3's
    switches: `gelu` gates the feed-forward by GELU in place of SiLU, `norms_from_one` adds one to the weights
    of norms, `post_norms` normalises the outputs of attention and feed-forward too, `scaled_embeddings`
    multiplies embeddings with the root of the hidden size, `query_scalar` is the number whose root divides
    attention scores (0: `head_dim`), and `local_theta` the base of rotary positions in layers with a window
    (0: `rope_theta` in all layers, with its scaling).

    Raises:
        LimbeckError: the sizes do not fit together.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict, hash=False)
    norm_eps: float = 1e-6
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: str = ""
    max_positions: int = 4096
    latent: Latent | None = None
    experts: Experts | None = None
    windows: tuple[int, ...] = ()
    share_kv: int = 1
    predicted: int = 0
    layer_norm: bool = False
    parallel: bool = False
    gated: bool = True
    gelu: bool = False
    norms_from_one: bool = False
    post_norms: bool = False
    scaled_embeddings: bool = False
    query_scalar: float = 0.0
    local_theta: float = 0.0

    def __post_init__(self) -> None:
        if self.rope_dim % 2:
            key = LATENT["rope_dim"] if self.latent else "head_dim"
            raise LimbeckError(
                f"{key} = {self.rope_dim} is odd, but rotary positions take dimensions in pairs; "
                "give an even size"
            )
        if not self.latent and self.heads % self.kv_heads:
            raise LimbeckError(
                f"num_key_value_heads = {self.kv_heads} does not divide num_attention_heads = {self.heads}; "
                "give a number that does"
            )

    # ------------------------------------------------------------ layers

    def sparse(self, layer: int) -> bool:
        """Return True if the feed-forward of `layer` is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense

    @property
    def sparse_layers(self) -> int:
        """The number of layers with a mixture of experts, including the modules of multi-token prediction."""
        return sum(self.sparse(layer) for layer in range(self.layers + self.predicted))

    def window(self, layer: int) -> int:
        """Return the number of positions that a token sees in `layer`, its own included; 0 means all."""
        return self.windows[layer] if layer < len(self.windows) else 0

    def is_local(self, layer: int) -> bool:
        """Return True if the rotary positions of `layer` have the base `local_theta`."""
        return bool(self.local_theta and self.window(layer))

    def keeps(self, layer: int) -> bool:
        """Return True if `layer` computes its own keys and values.

        Return False if it uses those of an earlier layer (cross-layer attention, arXiv 2405.12981).
        """
        return layer >= self.layers or layer % self.share_kv == 0

    def slot(self, layer: int) -> int:
        """Return the index of `layer`'s keys and values in the cache; layers that share them share it."""
        if layer < self.layers:
            return layer // self.share_kv
        return self.slots + layer - self.layers

    @property
    def slots(self) -> int:
        """The number of layers with keys and values of their own in the cache.

        The modules of multi-token prediction are not counted.
        """
        return -(-self.layers // self.share_kv)

    @property
    def cache_widths(self) -> tuple[int, int, int]:
        """What one layer caches for one token: (number of heads, values per key, values per value).

        MLA caches one vector, the latent and the rotated key, in place of keys and values: one head, and 0
        for values.
        """
        if self.latent:
            return 1, self.latent.cached, 0
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def rope_dim(self) -> int:
        """The number of dimensions of a head to which rotary positions are applied."""
        return self.latent.rope_dim if self.latent else self.head_dim

    def matrices(self, name: str) -> tuple[int, ...] | None:
        """Return the number of rows of each matrix that is stacked in the parameter `name`.

        Return None if the parameter is a single matrix. For example
        `matrices("blocks.0.attention.qkv.weight")` is `(64, 32, 32)`, the rows of the projections of queries,
        keys and values, for four query heads of 16 dimensions and two key heads.
        """
        leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if leaf == "qkv":
            keys = self.kv_heads * self.head_dim
            return self.heads * self.head_dim, keys, keys
        if leaf in ("q_latent", "q_full"):
            return self.latent.q_rank or self.heads * self.latent.key_dim, self.latent.cached
        if leaf == "gate_up":
            shared = ".shared." in name
            return (self.experts.shared_size if shared else self.intermediate_size,) * 2
        if leaf == "experts_gate_up":
            return (self.experts.intermediate_size,) * (2 * self.experts.count)
        if leaf == "experts_down":
            return (self.hidden_size,) * self.experts.count
        return None

    # ------------------------------------------------------------ sizes and costs

    @property
    def parameters(self) -> int:
        """The number of parameters, including embeddings but not the modules of multi-token prediction.

        These are counted by `parameters_ahead`.
        """
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        blocks = sum(self._block(layer) for layer in range(self.layers))
        return blocks + embeddings + self._norm

    @property
    def active_parameters(self) -> int:
        """The number of parameters that one token is multiplied with.

        Of the routed experts only the chosen ones count, and of embedding and head only the head.
        """
        head = self.vocab_size * self.hidden_size
        return sum(self._block(layer, active=True) for layer in range(self.layers)) + head

    @property
    def parameters_ahead(self) -> int:
        """The number of parameters of all modules of multi-token prediction.

        Each has a block, a projection of two concatenated states to one, and three norms.
        """
        extra = 2 * self.hidden_size**2 + 3 * self.hidden_size
        return sum(self._block(self.layers + depth) + extra for depth in range(self.predicted))

    @property
    def _norm(self) -> int:
        """The number of parameters of one norm of hidden states: scales, and with LayerNorm also biases."""
        return self.hidden_size * (1 + self.layer_norm)

    def _block(self, layer: int, active: bool = False) -> int:
        """Return the number of parameters of one layer; with `active`, only of those that one token uses."""
        attention = self._latent_attention if self.latent else self._attention(layer)
        norms = self._norm * (1 if self.parallel else 4 if self.post_norms else 2)
        return attention + self._ffn(layer, active) + norms

    def _attention(self, layer: int) -> int:
        """Return the number of parameters of the grouped-query attention of `layer`."""
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim * self.keeps(layer)
        products = self.hidden_size * (2 * queries + 2 * keys)
        biases = (queries + 2 * keys) * self.qkv_bias
        norms = 2 * self.head_dim * bool(self.qk_norm)
        return products + biases + norms

    @property
    def _latent_attention(self) -> int:
        """The number of parameters of one layer's multi-head latent attention."""
        latent = self.latent
        queries = self.heads * latent.key_dim
        if latent.q_rank:
            queries = latent.q_rank * (self.hidden_size + 1 + queries)
        else:
            queries = self.hidden_size * queries
        down = self.hidden_size * latent.cached + latent.kv_rank
        up = latent.kv_rank * self.heads * (latent.nope_dim + latent.value_dim)
        out = self.heads * latent.value_dim * self.hidden_size
        return queries + down + up + out

    def _ffn(self, layer: int, active: bool) -> int:
        """Return the number of parameters of one feed-forward; with `active`, of those that a token uses."""
        if not self.sparse(layer):
            return (2 + self.gated) * self.hidden_size * self.intermediate_size
        experts = self.experts
        used = experts.top_k if active else experts.count
        width = used * experts.intermediate_size + experts.shared_size
        router = experts.count * (self.hidden_size + experts.balanced)
        return 3 * self.hidden_size * width + router

    def flops_per_token(self, context: float, backward: bool = False) -> float:
        """Return the FLOPs of one token: 2 for each active parameter, and attention over `context` keys.

        This counts the forward pass alone, or with `backward` forward and backward pass, which is three times
        as much (Kaplan et al. 2020, section 2.1, with attention added).
        """
        key = self.latent.key_dim if self.latent else self.head_dim
        value = self.latent.value_dim if self.latent else self.head_dim
        seen = sum(min(context, self.window(layer) or context) for layer in range(self.layers))
        forward = 2 * self.active_parameters + 2 * self.heads * (key + value) * seen
        return forward * (3 if backward else 1)

    def kv_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Return the bytes of cache that one token takes in all layers, at `bytes_per_value` per number."""
        heads, key, value = self.cache_widths
        return self.slots * heads * (key + value) * bytes_per_value

    # ------------------------------------------------------------ config.json

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read the `config.json` of a model directory; `directory` may also be the JSON file itself.

        Raises:
            LimbeckError: the file is missing, damaged or not supported. The message names the file, the
                key and the remedy.
        """
        from .hf_config import read

        return read(directory)

    @classmethod
    def from_hf(cls, tree: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Translate a HuggingFace configuration `tree`; `where` is the name of its file in error messages.

        Raises:
            LimbeckError: a setting is missing, damaged or not supported.
        """
        from .hf_config import parse

        return parse(tree, where)

    def to_hf(self, eos: int, pad: int) -> dict[str, Any]:
        """Return the contents of a `config.json` that transformers reads.

        `eos` and `pad` are the ids of the end-of-sequence token and of the padding token.
        """
        from .hf_config import dump

        return dump(self, eos, pad)
