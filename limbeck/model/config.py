"""What a model is made of, read from a HuggingFace `config.json`; sizes and costs follow from it. No torch.

A family is data: which switches its layers use. A family that is not listed is refused with the list.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..types import LimbeckError


@dataclass(frozen=True)
class Family:
    """How a family's attention differs from Llama's, and what transformers calls it."""

    architecture: str
    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama"),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", qk_norm=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder: `ModelConfig("llama", vocab_size=48, hidden_size=64, layers=3, heads=4, kv_heads=2,
    head_dim=16, intermediate_size=176)` is the quickstart's base of 142 thousand parameters."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    norm_eps: float = 1e-6
    tied: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    max_positions: int = 4096

    @property
    def parameters(self) -> int:
        """Weights of the whole model, embeddings included."""
        return self._layer_weights * self.layers + self._embedding_weights + self.hidden_size

    @property
    def _layer_weights(self) -> int:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys)
        attention += (queries + 2 * keys) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def _embedding_weights(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of each matrix that is kept in one product with its neighbours."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"qkv": (queries, keys, keys), "gate_up": (self.intermediate_size, self.intermediate_size)}

    def flops_per_token(self, context: float, backward: bool = False) -> float:
        """Multiply-adds counted twice: 2 per weight touched, plus scores and mixing over `context` keys.

        Forward only, or forward and backward (3x), as in Kaplan et al. 2020, section 2.1, with attention.
        """
        matrices = self._layer_weights * self.layers + self.vocab_size * self.hidden_size
        attention = 2 * self.layers * self.heads * self.head_dim * context
        return (2 * matrices + 2 * attention) * (3 if backward else 1)

    def kv_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Cache bytes that one token of context costs."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read `config.json`; errors name the file, the key and what is supported."""
        path = directory / "config.json"
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LimbeckError(f"{path} is missing; a model directory holds config.json and *.safetensors") from None
        except (OSError, ValueError) as error:
            raise LimbeckError(f"{path}: not valid JSON ({error}); copy it again from the model's source") from None
        if not isinstance(tree, dict):
            raise LimbeckError(f"{path}: not a model's configuration; copy it again from the model's source")
        return cls.from_hf(tree, str(path))

    @classmethod
    def from_hf(cls, tree: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Translate a HuggingFace configuration."""
        architecture = (tree.get("architectures") or ["none"])[0]
        family = next((name for name, f in FAMILIES.items() if f.architecture == architecture), None)
        if family is None:
            known = ", ".join(f.architecture for f in FAMILIES.values())
            raise LimbeckError(f"{where}: architecture {architecture} is not supported; supported are {known}")
        _refuse_variants(tree, where)
        heads = _need(tree, "num_attention_heads", where)
        hidden = _need(tree, "hidden_size", where)
        rope = tree.get("rope_parameters") or {}
        scaling = {k: v for k, v in (tree.get("rope_scaling") or rope).items() if k != "rope_theta"}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise LimbeckError(f"{where}: rope_scaling of type {kind} is not supported; supported are linear, llama3")
        return cls(
            family=family,
            vocab_size=_need(tree, "vocab_size", where),
            hidden_size=hidden,
            layers=_need(tree, "num_hidden_layers", where),
            heads=heads,
            kv_heads=tree.get("num_key_value_heads") or heads,
            head_dim=tree.get("head_dim") or hidden // heads,
            intermediate_size=_need(tree, "intermediate_size", where),
            rope_theta=float(tree.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            rope_scaling={} if kind == "default" else {**scaling, "rope_type": kind},
            norm_eps=tree.get("rms_norm_eps", 1e-6),
            tied=bool(tree.get("tie_word_embeddings", False)),
            qkv_bias=FAMILIES[family].qkv_bias,
            qk_norm=FAMILIES[family].qk_norm,
            max_positions=tree.get("max_position_embeddings", 4096),
        )

    def to_hf(self, eos: int, pad: int) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        family = FAMILIES[self.family]
        return {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling or None,
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "bos_token_id": None,
            "torch_dtype": "float32",
        }


def _need(tree: dict[str, Any], key: str, where: str) -> int:
    if not isinstance(tree.get(key), int) or tree[key] < 1:
        raise LimbeckError(f"{where}: {key} = {tree.get(key)!r} is no size; copy the file again from its source")
    return tree[key]


def _refuse_variants(tree: dict[str, Any], where: str) -> None:
    """Switches that some checkpoints of a supported family set and that would change the logits."""
    wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
    for key, value in wanted.items():
        if tree.get(key, value) != value:
            raise LimbeckError(f"{where}: {key} = {tree[key]!r} is not supported; only {value!r} is")
