"""The decoder: tokens laid end to end in, hidden states out. N tokens · C hidden · D head size · V vocabulary.

Training, prefill and decoding call the same `forward`; only the context differs. Logits are made by whoever
needs them (`head`), for the positions they need.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..types import LimbeckError
from .attention import Context, GroupedQueryAttention, LatentAttention, RMSNorm, yarn_mscale
from .config import ModelConfig
from .ffn import GELU, MixtureOfExperts, SwiGLU
from .linear import Linear


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised copy and added back; Falcon's both on the same copy."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = (LatentAttention if config.latent else GroupedQueryAttention)(config, layer)
        self.ffn_norm = None if config.parallel else _norm(config)
        dense = SwiGLU if config.gated else GELU
        self.ffn = (
            MixtureOfExperts(config)
            if config.sparse(layer)
            else dense(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x_NC: Tensor, rope: tuple[Tensor, Tensor], context: Context) -> Tensor:
        normed_NC = self.attention_norm(x_NC)
        x_NC = x_NC + self.attention(normed_NC, rope, context)
        return x_NC + self.ffn(self.ffn_norm(x_NC) if self.ffn_norm else normed_NC, context)


class Ahead(nn.Module):
    """A module that predicts one token further (multi-token prediction; DeepSeek-V3, arXiv 2412.19437, section 2.2).

    From the state at a position and the token that follows it, the state that predicts the token after that
    one; embedding and head are the model's. Joint of embedding, then state, as V3's checkpoints store it.
    """

    def __init__(self, config: ModelConfig, depth: int):
        super().__init__()
        self.embed_norm, self.hidden_norm, self.head_norm = _norm(config), _norm(config), _norm(config)
        self.join = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, config.layers + depth)

    def forward(
        self, hidden_NC: Tensor, next_NC: Tensor, rope: tuple[Tensor, Tensor], context: Context
    ) -> Tensor:
        joined_NC = self.join(torch.cat([self.embed_norm(next_NC), self.hidden_norm(hidden_NC)], dim=-1))
        return self.head_norm(self.block(joined_NC, rope, context))


def _norm(config: ModelConfig) -> nn.Module:
    return (nn.LayerNorm if config.layer_norm else RMSNorm)(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """A language model without its sampling: `decoder(tokens_N, context)` -> hidden_NC.

    With `recompute`, learning keeps each block's input alone and computes the block again on the way back (Chen et
    al. 2016, arXiv 1604.06174): the same numbers for a third more time and a fraction of the memory.
    """

    recompute = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.ahead = nn.ModuleList(Ahead(config, depth) for depth in range(config.predicted))
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens_N: Tensor, context: Context) -> Tensor:
        rope = self._rope(context)
        x_NC = self.embed(tokens_N)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_NC = checkpoint(block, x_NC, rope, context, use_reentrant=False)
            else:
                x_NC = block(x_NC, rope, context)
        return self.norm(x_NC)

    def predict_next(self, hidden_NC: Tensor, next_N: Tensor, context: Context, depth: int = 0) -> Tensor:
        """States one token further than `hidden_NC`, in the context that made them; `next_N` is the token that
        follows each position (at depth 1 the one after that, and so on)."""
        return self.ahead[depth](hidden_NC, self.embed(next_N), self._rope(context), context)

    def _rope(self, context: Context) -> tuple[Tensor, Tensor]:
        return self.cos[context.positions].unsqueeze(1), self.sin[context.positions].unsqueeze(1)

    @torch.no_grad()
    def initialize(self, seed: int) -> Decoder:
        """Normal with deviation 1 / sqrt(inputs), less by depth for what writes into the residual stream;
        embeddings with 0.02. In small models this learns faster than 0.02 everywhere (GPT-2's)."""
        random = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue
            scale = 0.02 if name.startswith(("embed", "head")) else weight.shape[-1] ** -0.5
            writes = name.endswith(("out.weight", "down.weight", "experts_down"))
            weight.normal_(
                0.0, scale / math.sqrt(2 * self.config.layers) if writes else scale, generator=random
            )
        return self

    def prune_layers(self, layers: int) -> Decoder:
        """A decoder of evenly spaced layers of this one, first and last among them (as DistilBERT's student
        began, arXiv 1910.01108, section 2); its weights are copies."""
        if layers > self.config.layers:
            raise LimbeckError(f"layers = {layers}: the model has only {self.config.layers}; ask for fewer")
        kept = [round(i * (self.config.layers - 1) / max(1, layers - 1)) for i in range(layers)]
        if self.config.experts or self.config.windows or self.config.share_kv > 1 or self.config.predicted:
            raise LimbeckError(
                f"layers = {layers}: only dense models whose layers are all alike can be thinned"
            )
        student = Decoder(replace(self.config, layers=layers))
        student.load_state_dict(
            {k: v for k, v in self.state_dict().items() if not k.startswith("blocks.")}, strict=False
        )
        for place, layer in enumerate(kept):
            student.blocks[place].load_state_dict(self.blocks[layer].state_dict())
        return student


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sign-folded sin, [positions, D] (Su et al. 2021, arXiv 2104.09864), in float64 until the end."""
    scaling, half = config.rope_scaling, config.rope_dim // 2
    theta, kind = config.rope_theta, scaling.get("rope_type")
    if kind == "dynamic":  # Hunyuan's fixed alpha
        theta *= scaling["alpha"] ** (config.rope_dim / (config.rope_dim - 2))
    frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    stretched = {"linear": _interpolated, "llama3": _by_turns, "yarn": _by_dimension}.get(kind)
    frequency = stretched(frequency, scaling, theta) if stretched else frequency
    angle = torch.outer(torch.arange(config.max_positions, dtype=torch.float64), frequency)
    size = _yarn_magnitude(scaling) if kind == "yarn" else 1.0
    cos, sin = size * angle.cos(), size * angle.sin()
    return torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float()


def _interpolated(frequency: Tensor, scaling: dict, theta: float) -> Tensor:
    """Position interpolation (arXiv 2306.15595)."""
    return frequency / scaling["factor"]


def _by_turns(frequency: Tensor, scaling: dict, theta: float) -> Tensor:
    """Llama 3.1: slow waves stretched, fast ones kept."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * frequency + (1 - blend) * frequency / scaling["factor"]


def _by_dimension(frequency: Tensor, scaling: dict, theta: float) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp from kept to stretched waves, over the dimension."""
    half, trained = len(frequency), scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (1 - ramp) * frequency + ramp * frequency / scaling["factor"]


def _yarn_magnitude(scaling: dict) -> float:
    """What YaRN multiplies rotated vectors with; DeepSeek puts it into the scale of the scores instead."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    one, every = scaling.get("mscale"), scaling.get("mscale_all_dim")
    factor = scaling["factor"]
    return yarn_mscale(factor, one) / yarn_mscale(factor, every) if one and every else yarn_mscale(factor)
