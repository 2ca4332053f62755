"""The model architecture that the `shape` section of a recipe describes. Does not import torch."""

from __future__ import annotations

from ..config.parts import Shape
from .config import Experts, Latent, ModelConfig

SIZES = ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "rope_theta")
MAX_POSITIONS = 1024  # tokens of a sequence


def to_config(shape: Shape, vocab_size: int) -> ModelConfig:
    """Return the architecture for `shape`: DeepSeek-V3's if the shape has a `latent`, otherwise Llama's."""
    fields = {name: getattr(shape, name) for name in SIZES}
    fields["vocab_size"] = vocab_size
    fields["max_positions"] = MAX_POSITIONS
    fields["predicted"] = shape.mtp_layers
    if not shape.latent:
        head_dim = shape.hidden_size // shape.heads
        return ModelConfig("llama", **fields, head_dim=head_dim)
    latent = Latent(
        kv_rank=shape.latent.kv_lora_rank,
        nope_dim=shape.latent.nope_dim,
        rope_dim=shape.latent.rope_dim,
        value_dim=shape.latent.value_dim,
        q_rank=shape.latent.q_rank,
    )
    fields["kv_heads"] = shape.heads
    fields["head_dim"] = latent.rope_dim
    return ModelConfig("deepseek_v3", **fields, latent=latent, experts=_experts(shape))


def _experts(shape: Shape) -> Experts:
    """Return the mixture of experts of `shape`.

    A shape without experts gets a mixture that no layer uses: all its layers are listed as dense, as
    DeepSeek-V3's first three are.
    """
    mixture = shape.experts
    if not mixture:
        layers = range(shape.layers + shape.mtp_layers)
        return Experts(2, 1, 4, sigmoid=True, balanced=True, normalize=True, dense=tuple(layers))
    return Experts(
        mixture.count,
        mixture.top_k,
        mixture.intermediate_size,
        mixture.shared * mixture.intermediate_size,
        sigmoid=True,
        balanced=True,
        normalize=True,
        scale=mixture.scale,
        groups=mixture.groups,
        top_groups=mixture.top_groups,
        dense=tuple(range(mixture.dense_layers)),
    )
