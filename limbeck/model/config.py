"""The architecture of a model, and the sizes and costs that follow from it. No torch.

Attention and feed-forward are chosen layer by layer: `latent` turns attention into MLA, `experts` turns the
feed-forward of all layers but `experts.dense` into a mixture, `windows` limits how far a layer looks back.
`hf_config.py` reads and writes HuggingFace's `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..types import LimbeckError
from .families import LATENT


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    V3's is `Latent(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, q_rank=1536)`. With a `q_rank` of 0
    queries have full rank. `interleaved` is True if checkpoints store the rotary dimensions in pairs.
    """

    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int = 0
    interleaved: bool = True

    @property
    def key_dim(self) -> int:
        """Dimensions of a head's query and key, with positions and without."""
        return self.nope_dim + self.rope_dim

    @property
    def cached(self) -> int:
        """Values that a cache holds of one token: the latent and the rotated key."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    V3's is `Experts(count=256, top_k=8, intermediate_size=2048, shared_size=2048, sigmoid=True,
    balanced=True, normalize=True, scale=2.5, groups=8, top_groups=4, dense=(0, 1, 2))`. Scores are a softmax
    or sigmoids; `balanced` adds a bias to the choice of experts, not to their weights; `normalize` makes the
    chosen weights sum to one; `groups` limits the choice to the experts of the best `top_groups`. `capacity`
    is a limit in training, in multiples of the even load, beyond which tokens are recycled to experts with
    room; 0 is no limit.
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

    `qk_norm` normalises heads "before" or "after" their rotation; `share_kv` lets that many neighbouring
    layers use the keys and values of the first (CLA); `predicted` is the number of modules for multi-token
    prediction.

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
        """True if a layer's feed-forward is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense

    @property
    def sparse_layers(self) -> int:
        """The number of layers with a mixture, those of multi-token prediction included."""
        return sum(self.sparse(layer) for layer in range(self.layers + self.predicted))

    def window(self, layer: int) -> int:
        """The number of positions that a layer sees, its own included; 0 is all."""
        return self.windows[layer] if layer < len(self.windows) else 0

    def keeps(self, layer: int) -> bool:
        """True if a layer makes keys and values, False if it uses an earlier layer's (arXiv 2405.12981)."""
        return layer >= self.layers or layer % self.share_kv == 0

    def slot(self, layer: int) -> int:
        """The index of a layer's keys and values in the cache."""
        if layer < self.layers:
            return layer // self.share_kv
        return self.slots + layer - self.layers

    @property
    def slots(self) -> int:
        """The number of layers with keys in the cache, those of multi-token prediction not included."""
        return -(-self.layers // self.share_kv)

    @property
    def cache_widths(self) -> tuple[int, int, int]:
        """Heads, values of a key and values of a value that one layer caches of one token.

        MLA caches one latent, from which both are made.
        """
        if self.latent:
            return 1, self.latent.cached, 0
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.latent.rope_dim if self.latent else self.head_dim

    def matrices(self, name: str) -> tuple[int, ...] | None:
        """Rows of each matrix that is stacked in one of the decoder's parameters; None if it is one matrix.

        `matrices("blocks.0.attention.qkv.weight")` is `(64, 32, 32)` for four heads of 16 and two key heads.
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
        """Weights of the model, embeddings included, multi-token prediction (`parameters_ahead`) not."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        blocks = sum(self._block(layer) for layer in range(self.layers))
        return blocks + embeddings + self._norm

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with: its experts' alone, and of embeddings only the head."""
        head = self.vocab_size * self.hidden_size
        return sum(self._block(layer, active=True) for layer in range(self.layers)) + head

    @property
    def parameters_ahead(self) -> int:
        """Weights of multi-token prediction: a block, a joint of two states and three norms a module."""
        extra = 2 * self.hidden_size**2 + 3 * self.hidden_size
        return sum(self._block(self.layers + depth) + extra for depth in range(self.predicted))

    @property
    def _norm(self) -> int:
        """Weights of one normalisation of hidden states."""
        return self.hidden_size * (1 + self.layer_norm)

    def _block(self, layer: int, active: bool = False) -> int:
        """Weights of a layer, or those `active` for one token."""
        attention = self._latent_attention if self.latent else self._attention(layer)
        norms = self._norm * (1 if self.parallel else 2)
        return attention + self._ffn(layer, active) + norms

    def _attention(self, layer: int) -> int:
        """Weights of a layer's grouped-query attention."""
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim * self.keeps(layer)
        products = self.hidden_size * (2 * queries + 2 * keys)
        biases = (queries + 2 * keys) * self.qkv_bias
        norms = 2 * self.head_dim * bool(self.qk_norm)
        return products + biases + norms

    @property
    def _latent_attention(self) -> int:
        """Weights of a layer's MLA."""
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
        """Weights of a layer's feed-forward, or those `active` for one token."""
        if not self.sparse(layer):
            return (2 + self.gated) * self.hidden_size * self.intermediate_size
        experts = self.experts
        used = experts.top_k if active else experts.count
        width = used * experts.intermediate_size + experts.shared_size
        router = experts.count * (self.hidden_size + experts.balanced)
        return 3 * self.hidden_size * width + router

    def flops_per_token(self, context: float, backward: bool = False) -> float:
        """FLOPs of one token: 2 for each weight it meets, and attention over `context` keys.

        Forward only, or forward and backward (3x), as in Kaplan et al. 2020, section 2.1, with attention.
        """
        key = self.latent.key_dim if self.latent else self.head_dim
        value = self.latent.value_dim if self.latent else self.head_dim
        seen = sum(min(context, self.window(layer) or context) for layer in range(self.layers))
        forward = 2 * self.active_parameters + 2 * self.heads * (key + value) * seen
        return forward * (3 if backward else 1)

    def kv_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Bytes that one token takes in the cache."""
        heads, key, value = self.cache_widths
        return self.slots * heads * (key + value) * bytes_per_value

    # ------------------------------------------------------------ config.json

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read the `config.json` of a model directory, or the given file.

        Raises: LimbeckError: the file is missing, damaged or not supported; names the file, the key and the
        remedy.
        """
        from .hf_config import read

        return read(directory)

    @classmethod
    def from_hf(cls, tree: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Translate a HuggingFace configuration; `where` is the name of its file in errors.

        Raises:
            LimbeckError: a setting is missing, damaged or not supported.
        """
        from .hf_config import parse

        return parse(tree, where)

    def to_hf(self, eos: int, pad: int) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        from .hf_config import dump

        return dump(self, eos, pad)
