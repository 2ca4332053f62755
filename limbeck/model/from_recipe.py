"""The model that a recipe's shape describes. No torch."""

from __future__ import annotations

from ..config.parts import Shape
from .config import Experts, Latent, ModelConfig


def to_config(shape: Shape, vocab_size: int) -> ModelConfig:
    """The model that a recipe's shape describes."""
    sizes = {
        name: getattr(shape, name)
        for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "rope_theta")
    }
    sizes |= {
        "vocab_size": vocab_size,
        "head_dim": shape.hidden_size // shape.heads,
        "max_positions": 1024,
        "predicted": shape.mtp_layers,
    }
    if not shape.latent:
        return ModelConfig("llama", **sizes)
    latent = Latent(
        kv_rank=shape.latent.kv_lora_rank,
        nope_dim=shape.latent.nope_dim,
        rope_dim=shape.latent.rope_dim,
        value_dim=shape.latent.value_dim,
        q_rank=shape.latent.q_rank,
    )
    given = shape.experts
    # a model without a mixture is one whose layers are all dense, as DeepSeek-V3's first three
    experts = Experts(
        2,
        1,
        4,
        sigmoid=True,
        balanced=True,
        normalize=True,
        dense=tuple(range(shape.layers + shape.mtp_layers)),
    )
    if given:
        experts = Experts(
            given.count,
            given.top_k,
            given.intermediate_size,
            given.shared * given.intermediate_size,
            sigmoid=True,
            balanced=True,
            normalize=True,
            scale=given.scale,
            groups=given.groups,
            top_groups=given.top_groups,
            dense=tuple(range(given.dense_layers)),
        )
    return ModelConfig(
        "deepseek_v3",
        **sizes | {"kv_heads": shape.heads, "head_dim": latent.rope_dim},
        latent=latent,
        experts=experts,
    )
