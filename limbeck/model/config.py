"""What a model is made of, read from a HuggingFace `config.json`; sizes and costs follow from it. No torch.

Attention and feed-forward are chosen layer by layer: `latent` turns attention into MLA, `experts` turns the
feed-forward of all layers but `experts.dense` into a mixture, `windows` bounds how far a layer looks back.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..types import LimbeckError
from .families import FAMILIES, LATENT, Family


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    V3's is `Latent(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, q_rank=1536)`; `q_rank` 0 leaves
    queries at full rank. `interleaved` says how checkpoints lay out the rotary dimensions.
    """

    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int = 0
    interleaved: bool = True


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    V3's is `Experts(count=256, top_k=8, intermediate_size=2048, shared_size=2048, sigmoid=True, balanced=True,
    normalize=True, scale=2.5, groups=8, top_groups=4, dense=(0, 1, 2))`. Scores are a softmax or sigmoids;
    `balanced` adds a bias that selects and never weighs; `normalize` makes the chosen weights sum to one;
    `groups` limits the choice to the experts of the best `top_groups`. `capacity` is a training limit, in
    shares of the even load, beyond which tokens are recycled to experts with room; 0 is no limit.
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
    """A decoder: `ModelConfig("llama", vocab_size=48, hidden_size=64, layers=3, heads=4, kv_heads=2,
    head_dim=16, intermediate_size=176)` is a model of 130 thousand parameters.

    `qk_norm` normalises heads "before" or "after" their rotation; `share_kv` lets that many neighbouring layers
    use the keys and values of the first (CLA); `predicted` counts modules that look one token further each.
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
        key = LATENT["rope_dim"] if self.latent else "head_dim"
        if self.rope_dim % 2:
            raise LimbeckError(
                f"{key} = {self.rope_dim} is odd, but rotary positions take dimensions in pairs; give an even size"
            )
        if not self.latent and self.heads % self.kv_heads:
            told = f"num_key_value_heads = {self.kv_heads} does not divide num_attention_heads = {self.heads}"
            raise LimbeckError(f"{told}; give a number that does")

    # ------------------------------------------------------------ layers

    def sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense

    @property
    def sparse_layers(self) -> int:
        """How many layers are, those that look ahead included."""
        return sum(self.sparse(layer) for layer in range(self.layers + self.predicted))

    def window(self, layer: int) -> int:
        """How many positions a layer sees, itself included; 0 is all."""
        return self.windows[layer] if layer < len(self.windows) else 0

    def keeps(self, layer: int) -> bool:
        """Whether a layer makes keys and values, or uses those of a layer before (arXiv 2405.12981)."""
        return layer >= self.layers or layer % self.share_kv == 0

    def slot(self, layer: int) -> int:
        """Where a layer's keys and values lie in the cache."""
        return layer // self.share_kv if layer < self.layers else self.slots + layer - self.layers

    @property
    def slots(self) -> int:
        """Layers that keep something in the cache, those that look ahead aside."""
        return -(-self.layers // self.share_kv)

    @property
    def cache_widths(self) -> tuple[int, int, int]:
        """Heads, values of a key and of a value that one layer keeps of one token. MLA keeps one latent, from
        which both are made."""
        if self.latent:
            return 1, self.latent.kv_rank + self.latent.rope_dim, 0
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def rope_dim(self) -> int:
        return self.latent.rope_dim if self.latent else self.head_dim

    def matrices(self, name: str) -> tuple[int, ...] | None:
        """Rows of each matrix that one of the decoder's parameters holds on top of each other; None: it is one.

        `matrices("blocks.0.attention.qkv.weight")` is `(64, 32, 32)` for four heads of 16 and two key heads.
        """
        leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        latent, experts = self.latent, self.experts
        if leaf == "qkv":
            return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim
        if leaf == "gate_up":
            return (experts.shared_size if ".shared." in name else self.intermediate_size,) * 2
        if leaf in ("q_latent", "q_full"):
            asks = latent.q_rank or self.heads * (latent.nope_dim + latent.rope_dim)
            return asks, latent.kv_rank + latent.rope_dim
        if leaf == "experts_gate_up":
            return (experts.intermediate_size,) * (2 * experts.count)
        return (self.hidden_size,) * experts.count if leaf == "experts_down" else None

    # ------------------------------------------------------------ sizes and costs

    @property
    def parameters(self) -> int:
        """Weights of the model, embeddings included, modules that look ahead (`parameters_ahead`) not."""
        norm = self.hidden_size * (1 + self.layer_norm)
        return sum(self._block(layer) for layer in range(self.layers)) + self._embeddings + norm

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with: its experts' alone, and of embeddings only the head."""
        return (
            sum(self._block(layer, True) for layer in range(self.layers)) + self.vocab_size * self.hidden_size
        )

    @property
    def parameters_ahead(self) -> int:
        """Weights of the modules that look ahead: a block, a joint of two states, three norms each."""
        extra = 2 * self.hidden_size**2 + 3 * self.hidden_size
        return sum(self._block(self.layers + i) + extra for i in range(self.predicted))

    @property
    def _embeddings(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    def _block(self, layer: int, active: bool = False) -> int:
        norms = self.hidden_size * (1 + self.layer_norm) * (1 if self.parallel else 2)
        return self._attention(layer) + self._ffn(layer, active) + norms

    def _attention(self, layer: int) -> int:
        if self.latent:
            latent, key_dim = self.latent, self.latent.nope_dim + self.latent.rope_dim
            queries = self.heads * key_dim
            low = latent.q_rank
            asks = low * (self.hidden_size + 1 + queries) if low else self.hidden_size * queries
            tells = self.hidden_size * (latent.kv_rank + latent.rope_dim) + latent.kv_rank
            tells += latent.kv_rank * self.heads * (latent.nope_dim + latent.value_dim)
            return asks + tells + self.heads * latent.value_dim * self.hidden_size
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim * self.keeps(layer)
        norms = 2 * self.head_dim * bool(self.qk_norm)
        return self.hidden_size * (2 * queries + 2 * keys) + (queries + 2 * keys) * self.qkv_bias + norms

    def _ffn(self, layer: int, active: bool) -> int:
        if not self.sparse(layer):
            return (2 + self.gated) * self.hidden_size * self.intermediate_size
        experts = self.experts
        met = experts.top_k if active else experts.count
        width = met * experts.intermediate_size + experts.shared_size
        return 3 * self.hidden_size * width + experts.count * (self.hidden_size + experts.balanced)

    def flops_per_token(self, context: float, backward: bool = False) -> float:
        """Multiply-adds counted twice: 2 per weight met, plus scores and mixing over `context` keys.

        Forward only, or forward and backward (3x), as in Kaplan et al. 2020, section 2.1, with attention.
        """
        key, value = self.head_dim, self.head_dim
        if self.latent:
            key, value = self.latent.nope_dim + self.latent.rope_dim, self.latent.value_dim
        seen = sum(min(context, self.window(layer) or context) for layer in range(self.layers))
        return (2 * self.active_parameters + 2 * self.heads * (key + value) * seen) * (3 if backward else 1)

    def kv_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Cache bytes that one token of context costs."""
        heads, key, value = self.cache_widths
        return self.slots * heads * (key + value) * bytes_per_value

    # ------------------------------------------------------------ config.json

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read `config.json`, there or given itself; errors name the file, the key and what is supported."""
        path = directory if directory.suffix == ".json" else directory / "config.json"
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LimbeckError(
                f"{path} is missing; a model directory holds config.json and *.safetensors"
            ) from None
        except (OSError, ValueError) as error:
            raise LimbeckError(
                f"{path}: not valid JSON ({error}); copy it again from the model's source"
            ) from None
        if not isinstance(tree, dict):
            raise LimbeckError(f"{path}: not a model's configuration; copy it again from the model's source")
        return cls.from_hf(tree, str(path))

    @classmethod
    def from_hf(cls, tree: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Translate a HuggingFace configuration."""
        name = _family(tree, where)
        family = FAMILIES[name]
        tree = {**_implied(name, tree), **tree}
        for key, value in family.wanted.items():
            if _one(tree.get(key, value)) != value:
                raise LimbeckError(
                    f"{where}: {key} = {tree[key]!r} is not supported for {name}; only {value!r} is"
                )
        sizes = {ours: _size(tree, theirs, where) for ours, theirs in family.sizes.items()}
        heads, layers = sizes["heads"], sizes["layers"]
        theta, scaling = _rope(tree, family, where)
        switches = dict(family.switches)
        if name == "hunyuan":
            shared = tree.get("cla_share_factor", 1) if tree.get("use_cla") else 1
            switches |= {"qk_norm": "after" if tree.get("use_qk_norm") else "", "share_kv": shared}
        fields = {
            **sizes,
            "kv_heads": tree.get("num_key_value_heads") or heads,
            "head_dim": tree.get("head_dim") or sizes["hidden_size"] // heads,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_eps": tree.get(family.norm_eps, 1e-6),
            "tied": bool(tree.get("tie_word_embeddings", family.tied)),
            "max_positions": tree.get("max_position_embeddings", 4096),
            "latent": _latent(tree, where) if family.latent else None,
            "experts": _experts(tree, name, where) if family.experts else None,
            "windows": _windows(tree, layers),
            "predicted": tree.get("num_nextn_predict_layers") or tree.get("num_mtp_layers") or 0,
            **switches,
        }
        try:
            return cls(name, **fields)
        except LimbeckError as error:
            raise LimbeckError(f"{where}: {error}") from None

    def to_hf(self, eos: int, pad: int) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        family = FAMILIES[self.family]
        tree = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **{theirs: getattr(self, ours) for ours, theirs in family.sizes.items()},
            **(
                {}
                if self.family == "falcon"
                else {"num_key_value_heads": self.kv_heads, "head_dim": self.head_dim}
            ),
            "max_position_embeddings": self.max_positions,
            family.norm_eps: self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling or None,
            "tie_word_embeddings": self.tied,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "bos_token_id": None,
            "torch_dtype": "float32",
            **{key: value for key, value in family.wanted.items() if key != "mlp_bias"},
        }
        if any(self.windows):
            kinds = ["sliding_attention" if window else "full_attention" for window in self.windows]
            tree |= {"sliding_window": max(self.windows), "use_sliding_window": True, "layer_types": kinds}
            tree["max_window_layers"] = self.layers if all(self.windows) else kinds.index("sliding_attention")
        elif self.family in ("mistral", "mixtral"):
            tree["sliding_window"] = None  # transformers would take 4,096
        if self.predicted:
            tree["num_nextn_predict_layers"] = self.predicted
        if self.latent:
            tree |= {theirs: getattr(self.latent, ours) for ours, theirs in LATENT.items()}
            tree |= {"q_lora_rank": self.latent.q_rank or None, "head_dim": self.latent.rope_dim}
            tree["rope_interleave"] = self.latent.interleaved
        if self.experts:
            tree |= self._hf_experts(family)
        if self.family == "hunyuan":
            tree |= {
                "use_qk_norm": bool(self.qk_norm),
                "use_cla": self.share_kv > 1,
                "cla_share_factor": self.share_kv,
            }
        return tree

    def _hf_experts(self, family: Family) -> dict[str, Any]:
        experts = self.experts
        tree = {theirs: getattr(experts, ours) for ours, theirs in family.experts.items()}
        if self.family.startswith("deepseek"):
            tree["n_shared_experts"] = experts.shared_size // experts.intermediate_size or None
            tree["first_k_dense_replace"] = len(experts.dense)
        if self.family == "deepseek_v2":
            tree["topk_method"] = "group_limited_greedy" if experts.groups > 1 else "greedy"
        if self.family == "qwen3_moe":
            tree |= {"mlp_only_layers": list(experts.dense), "decoder_sparse_step": 1}
        if self.family == "hunyuan":
            tree["num_shared_expert"] = experts.shared_size // experts.intermediate_size
            tree |= {
                "moe_drop_tokens": bool(experts.capacity),
                "moe_random_routing_dropped_token": bool(experts.capacity),
            }
        return tree


def _family(tree: dict[str, Any], where: str) -> str:
    architecture = (tree.get("architectures") or ["none"])[0]
    for name, family in FAMILIES.items():
        if family.architecture == architecture:
            return name
    known = ", ".join(family.architecture for family in FAMILIES.values())
    code = tree.get("auto_map")
    if code:
        raise LimbeckError(
            f"{where}: architecture {architecture} comes as Python code beside the weights (auto_map), which is never "
            f"run; use a checkpoint of a supported architecture: {known}"
        )
    raise LimbeckError(f"{where}: architecture {architecture} is not supported; supported are {known}")


def _implied(name: str, tree: dict[str, Any]) -> dict[str, Any]:
    """What a family's files may leave out or name otherwise."""
    if name == "falcon":
        return {"ffn_hidden_size": 4 * tree.get("hidden_size", 0), "num_key_value_heads": 1}
    if name == "qwen3_moe" and "num_local_experts" in tree:
        return {"num_experts": tree["num_local_experts"]}
    return {}


def _size(tree: dict[str, Any], key: str, where: str) -> int:
    value = _one(tree.get(key))
    if not isinstance(value, int) or value < 1:
        raise LimbeckError(f"{where}: {key} = {value!r} is no size; copy the file again from its source")
    return value


def _one(value: Any) -> Any:
    """Hunyuan's files give some numbers layer by layer; layers that differ are not one number."""
    return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value


def _rope(tree: dict[str, Any], family: Family, where: str) -> tuple[float, dict[str, Any]]:
    given = tree.get("rope_parameters") or {}
    theta = float(tree.get("rope_theta") or given.get("rope_theta") or family.theta)
    scaling = {
        k: v for k, v in (tree.get("rope_scaling") or given).items() if k not in ("rope_theta", "type")
    }
    share = tree.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1
    if share != 1 and not family.latent:
        raise LimbeckError(f"{where}: partial_rotary_factor = {share} is not supported; only 1 is")
    kind = scaling.get("rope_type") or (tree.get("rope_scaling") or given).get("type") or "default"
    if kind == "default":
        return theta, {}
    if kind not in ("linear", "llama3", "yarn") and not (kind == "dynamic" and scaling.get("alpha")):
        raise LimbeckError(
            f"{where}: rope_scaling of type {kind} is not supported; supported are linear, llama3, yarn, dynamic with alpha"
        )
    if kind != "dynamic" and not isinstance(scaling.get("factor"), int | float):
        raise LimbeckError(f"{where}: rope_scaling has no factor; copy the file again from its source")
    return theta, {**scaling, "rope_type": kind}


def _latent(tree: dict[str, Any], where: str) -> Latent:
    sizes = {ours: _size(tree, theirs, where) for ours, theirs in LATENT.items()}
    return Latent(**sizes, q_rank=tree.get("q_lora_rank") or 0, interleaved=tree.get("rope_interleave", True))


def _experts(tree: dict[str, Any], name: str, where: str) -> Experts | None:
    family, layers = FAMILIES[name], tree["num_hidden_layers"]
    if not tree.get(family.experts["count"]):
        return None
    given = {
        ours: _one(tree[theirs]) for ours, theirs in family.experts.items() if tree.get(theirs) is not None
    }
    for ours in ("count", "top_k", "intermediate_size"):
        given[ours] = _size(tree, family.experts[ours], where)
    shared = _one(tree.get("n_shared_experts" if name.startswith("deepseek") else "num_shared_expert")) or 0
    if name == "hunyuan_v1_moe":
        shared = 1
    dense = set(range(tree.get("first_k_dense_replace") or 0)) if name.startswith("deepseek") else set()
    if name == "qwen3_moe":
        step = tree.get("decoder_sparse_step", 1)
        dense = {
            *(tree.get("mlp_only_layers") or ()),
            *(layer for layer in range(layers) if (layer + 1) % step),
        }
    if name == "deepseek_v2" and tree.get("topk_method", "greedy") == "greedy":
        given |= {"groups": 1, "top_groups": 1}
    capacity = 1.0 if name == "hunyuan" and tree.get("moe_random_routing_dropped_token") else 0.0
    return Experts(
        **{**family.gate, **given},
        shared_size=shared * given["intermediate_size"],
        dense=tuple(sorted(dense)),
        capacity=capacity,
    )


def _windows(tree: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Positions that each layer sees. Qwen's `sliding_window` counts only where it is switched on."""
    width = tree.get("sliding_window")
    if not width or not tree.get("use_sliding_window", True):
        return ()
    kinds = tree.get("layer_types")
    if kinds is None:
        first = tree.get("max_window_layers", 0) if "use_sliding_window" in tree else 0
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return tuple(width if kind == "sliding_attention" else 0 for kind in kinds)
