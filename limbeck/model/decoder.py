"""The decoder: tokens laid end to end in, hidden states out. N tokens · C hidden · D head size · V vocabulary.

Training, prefill and decoding call the same `forward`; only the context differs. Logits are made by whoever
needs them (`head`), for the positions they need.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..types import LimbeckError
from .attention import Context, GroupedQueryAttention, RMSNorm
from .config import ModelConfig
from .ffn import SwiGLU


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised copy and added back."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = GroupedQueryAttention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x_NC: Tensor, rope: tuple[Tensor, Tensor], context: Context) -> Tensor:
        x_NC = x_NC + self.attention(self.attention_norm(x_NC), rope, context)
        return x_NC + self.ffn(self.ffn_norm(x_NC))


class Decoder(nn.Module):
    """A language model without its sampling: `decoder(tokens_N, context)` -> hidden_NC."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens_N: Tensor, context: Context) -> Tensor:
        positions_N = context.positions
        rope = self.cos[positions_N].unsqueeze(1), self.sin[positions_N].unsqueeze(1)
        x_NC = self.embed(tokens_N)
        for block in self.blocks:
            x_NC = block(x_NC, rope, context)
        return self.norm(x_NC)

    @torch.no_grad()
    def initialize(self, seed: int) -> Decoder:
        """Normal with deviation 1 / sqrt(inputs), less by depth for what writes into the residual stream;
        embeddings with 0.02. In small models this learns faster than 0.02 everywhere (GPT-2's)."""
        random = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue
            scale = 0.02 if name.startswith(("embed", "head")) else weight.shape[1] ** -0.5
            writes = name.endswith(("out.weight", "down.weight"))
            weight.normal_(0.0, scale / math.sqrt(2 * self.config.layers) if writes else scale, generator=random)
        return self

    def thinned(self, layers: int) -> Decoder:
        """A decoder of evenly spaced layers of this one, first and last among them (as DistilBERT's student
        began, arXiv 1910.01108, section 2); its weights are copies."""
        if layers > self.config.layers:
            raise LimbeckError(f"layers = {layers}: the model has only {self.config.layers}; ask for fewer")
        kept = [round(i * (self.config.layers - 1) / max(1, layers - 1)) for i in range(layers)]
        student = Decoder(replace(self.config, layers=layers))
        student.load_state_dict({k: v for k, v in self.state_dict().items() if not k.startswith("blocks.")}, strict=False)
        for place, layer in enumerate(kept):
            student.blocks[place].load_state_dict(self.blocks[layer].state_dict())
        return student


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sign-folded sin, [positions, D] (Su et al. 2021, arXiv 2104.09864), in float64 until the end."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    frequency = _scale(frequency, config.rope_scaling)
    angle = torch.outer(torch.arange(config.max_positions, dtype=torch.float64), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float()


def _scale(frequency: Tensor, scaling: dict) -> Tensor:
    """Position interpolation (arXiv 2306.15595), or Llama 3.1's: slow waves stretched, fast ones kept."""
    if not scaling:
        return frequency
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return blend * frequency + (1 - blend) * frequency / factor
