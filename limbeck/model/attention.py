"""Attention layers. N tokens · C hidden · H heads · K key/value heads · D head size.

A layer only makes queries, keys and values. *Whom* a token may look at is the context's affair:
`Packed` (cache.py) for whole sequences laid end to end, `KVCache` for one new token a row.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from .config import ModelConfig


class Context(Protocol):
    """Where attention happens: q [N,H,D], k and v [N,K,D] in, mixed values [N,H,D] out."""

    positions: Tensor

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor: ...


class GroupedQueryAttention(nn.Module):
    """GQA (Ainslie et al. 2023, arXiv 2305.13245); MHA and MQA are its ends.

    Queries, keys and values come out of one product. Qwen2 adds a bias to it, Qwen3 normalises heads.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, config.heads, config.kv_heads, config.head_dim
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.out = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_NC: Tensor, rope: tuple[Tensor, Tensor], context: Context) -> Tensor:
        heads_NHD = self.qkv(x_NC).view(len(x_NC), -1, self.head_dim)
        qk_NHD, v_NKD = heads_NHD.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None:
            q_NHD, k_NKD = qk_NHD.split([self.heads, self.kv_heads], dim=1)
            qk_NHD = torch.cat([self.q_norm(q_NHD), self.k_norm(k_NKD)], dim=1)
        q_NHD, k_NKD = rotate(qk_NHD, rope).split([self.heads, self.kv_heads], dim=1)
        return self.out(context.attend(self.layer, q_NHD, k_NKD, v_NKD).flatten(1))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Normalize.apply(x, self.weight, self.eps)


class _Normalize(torch.autograd.Function):
    """Half the passes over memory of torch's composite rms_norm on a CPU, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, grad):
        unit, scale, weight = ctx.saved_tensors
        by_unit = grad * unit
        along = (by_unit @ weight).unsqueeze(-1) / unit.shape[-1]
        grad_x = torch.addcmul(grad * weight, unit, along, value=-1).mul_(scale)
        return grad_x, by_unit.flatten(0, -2).sum(0), None


def rotate(x_NHD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions in the half-split layout: x * cos + roll(x) * signed sin."""
    cos_N1D, sin_N1D = rope
    return torch.addcmul(x_NHD * cos_N1D, x_NHD.roll(x_NHD.shape[-1] // 2, -1), sin_N1D)
