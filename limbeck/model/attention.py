"""Attention layers. N tokens · C hidden · H heads · K key/value heads · D head size · R latent rank.

A layer only makes queries, keys and values. *Whom* a token may look at is the context's affair:
`Packed` (kv_cache.py) for whole sequences laid end to end, `KVCache` for the next tokens of each row.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import kernels
from .config import ModelConfig
from .linear import Linear

if TYPE_CHECKING:
    from .ffn import Routes


class Layer(NamedTuple):
    """What a context must know of the layer that asks: where its keys lie in a cache, the scale of its scores,
    and how many positions it sees, itself included (0: all)."""

    slot: int
    scale: float
    window: int


class Context(Protocol):
    """Where attention happens: q [N,H,D], k and v [N,K,D] in, mixed values [N,H,D] out.

    A layer that uses an earlier layer's keys and values gives none. `absorbed` contexts take MLA's latents for
    keys and give mixed latents back; the others are given whole keys and values, and `kept` is what to remember.
    """

    positions: Tensor
    absorbed: bool
    routes: Routes | None

    def attend(
        self, layer: Layer, q: Tensor, k: Tensor | None, v: Tensor | None, kept: Tensor | None = None
    ) -> Tensor: ...


class GroupedQueryAttention(nn.Module):
    """GQA (Ainslie et al. 2023, arXiv 2305.13245); MHA and MQA are its ends.

    Queries, keys and values come out of one product. Qwen2 adds a bias to it, Qwen3 normalises heads before
    they are rotated, Hunyuan after. With CLA (arXiv 2405.12981) some layers make queries alone; as each has a
    key norm of its own, keys are kept without its weight, which goes into the queries.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.layer = Layer(config.slot(layer), config.head_dim**-0.5, config.window(layer))
        self.norm_after, self.shares = config.qk_norm == "after", config.share_kv > 1
        rows = (config.heads + 2 * config.kv_heads * config.keeps(layer)) * config.head_dim
        self.keeps = config.keeps(layer)
        setattr(self, "qkv" if self.keeps else "q", Linear(config.hidden_size, rows, bias=config.qkv_bias))
        self.out = Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_NC: Tensor, rope: tuple[Tensor, Tensor], context: Context) -> Tensor:
        if not self.keeps:
            q_NHD = self._shared_queries(rotate(self.q(x_NC).view(len(x_NC), -1, self.head_dim), rope))
            return self.out(context.attend(self.layer, q_NHD, None, None).flatten(1))
        heads_NHD = self.qkv(x_NC).view(len(x_NC), -1, self.head_dim)
        qk_NHD, v_NKD = heads_NHD.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None and not self.norm_after:
            q_NHD, k_NKD = qk_NHD.split([self.heads, self.kv_heads], dim=1)
            qk_NHD = torch.cat([self.q_norm(q_NHD), self.k_norm(k_NKD)], dim=1)
        q_NHD, k_NKD = rotate(qk_NHD, rope).split([self.heads, self.kv_heads], dim=1)
        if self.norm_after and self.shares:
            q_NHD, k_NKD = (
                self._shared_queries(q_NHD),
                _Normalize.apply(k_NKD, torch.ones_like(self.k_norm.weight), self.k_norm.eps),
            )
        elif self.norm_after:
            q_NHD, k_NKD = self.q_norm(q_NHD), self.k_norm(k_NKD)
        return self.out(context.attend(self.layer, q_NHD, k_NKD, v_NKD).flatten(1))

    def _shared_queries(self, q_NHD: Tensor) -> Tensor:
        return q_NHD if self.q_norm is None else self.q_norm(q_NHD) * self.k_norm.weight


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437, eq. 1-11).

    Keys and values are made from one latent a token, and a rotated key that all heads share. Over whole
    sequences they are written out; over a cache, which holds the latents alone, the two products that would
    make them are absorbed into the queries and the output.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        latent = self.latent = config.latent
        self.heads = config.heads
        key_dim = latent.nope_dim + latent.rope_dim
        self.asks = latent.q_rank or config.heads * key_dim
        inward = Linear(config.hidden_size, self.asks + latent.kv_rank + latent.rope_dim, bias=False)
        if latent.q_rank:
            self.q_latent = inward
            self.q_norm = RMSNorm(latent.q_rank, 1e-6)
            self.q_up = Linear(latent.q_rank, config.heads * key_dim, bias=False)
        else:
            self.q_full = inward
        self.kv_norm = RMSNorm(latent.kv_rank, 1e-6)
        self.kv_up = Linear(latent.kv_rank, config.heads * (latent.nope_dim + latent.value_dim), bias=False)
        self.out = Linear(config.heads * latent.value_dim, config.hidden_size, bias=False)
        scale = key_dim**-0.5 * yarn_attention_scale(config.rope_scaling) ** 2
        self.layer = Layer(config.slot(layer), scale, config.window(layer))

    def forward(self, x_NC: Tensor, rope: tuple[Tensor, Tensor], context: Context) -> Tensor:
        latent, rows = self.latent, len(x_NC)
        inward = self.q_latent if latent.q_rank else self.q_full
        q_N, latent_NR, k_rope_ND = inward(x_NC).split([self.asks, latent.kv_rank, latent.rope_dim], dim=-1)
        if latent.q_rank:
            q_N = self.q_up(self.q_norm(q_N))
        q_nope_NHD, q_rope_NHD = q_N.view(rows, self.heads, -1).split(
            [latent.nope_dim, latent.rope_dim], dim=-1
        )
        q_rope_NHD, k_rope_N1D = rotate(q_rope_NHD, rope), rotate(k_rope_ND.unsqueeze(1), rope)
        latent_NR = self.kv_norm(latent_NR)
        kept_N1D = torch.cat([latent_NR.unsqueeze(1), k_rope_N1D], dim=-1)
        up_HDR = self.kv_up.weight.view(self.heads, -1, latent.kv_rank)
        up_key_HDR, up_value_HDR = up_HDR.split([latent.nope_dim, latent.value_dim], dim=1)
        if context.absorbed:
            asked_NHR = torch.einsum("nhd,hdr->nhr", q_nope_NHD, up_key_HDR)
            q_NHD = torch.cat([asked_NHR, q_rope_NHD], dim=-1)
            mixed_NHR = context.attend(self.layer, q_NHD, kept_N1D, None)
            return self.out(torch.einsum("nhr,hdr->nhd", mixed_NHR, up_value_HDR).flatten(1))
        kv_NHD = self.kv_up(latent_NR).view(rows, self.heads, -1)
        k_nope_NHD, v_NHD = kv_NHD.split([latent.nope_dim, latent.value_dim], dim=-1)
        k_NHD = torch.cat([k_nope_NHD, k_rope_N1D.expand(-1, self.heads, -1)], dim=-1)
        q_NHD = torch.cat([q_nope_NHD, q_rope_NHD], dim=-1)
        return self.out(context.attend(self.layer, q_NHD, k_NHD, v_NHD, kept_N1D).flatten(1))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        kind = kernels.Normalize if kernels.serves("norm", x.numel(), x, self.weight) else _Normalize
        return kind.apply(x, self.weight, self.eps)


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
    if kernels.serves("rotate", x_NHD.numel(), x_NHD):
        return kernels.Rotate.apply(x_NHD, cos_N1D, sin_N1D)
    return torch.addcmul(x_NHD * cos_N1D, x_NHD.roll(x_NHD.shape[-1] // 2, -1), sin_N1D)


def yarn_attention_scale(scaling: dict) -> float:
    """By how much YaRN as DeepSeek uses it sharpens the scores (arXiv 2309.00071, eq. 22)."""
    every = scaling.get("mscale_all_dim")
    return yarn_mscale(scaling["factor"], every) if every else 1.0


def yarn_mscale(factor: float, slope: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0
