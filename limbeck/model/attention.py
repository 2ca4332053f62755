"""Attention layers. N tokens · C hidden size · H heads · K key/value heads · D head size · R latent rank.

A layer only computes queries, keys and values. What a token attends to is decided by the context: `Packed`
(packed.py) for whole sequences that are concatenated, `KVCache` (kv_cache.py) for the next tokens of each row
of a decode batch. `rope` is a pair of cos and sin [N, 1, D] of each token's rotary angles, in the form of
`decoder.rope_table`: the first half of sin is negated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .context import Context, Layer
from .linear import Linear
from .ops import CPU, Ops
from .ops.plain import Normalize
from .ops.table import Latents, Rope


class GroupedQueryAttention(nn.Module):
    """GQA (Ainslie et al. 2023, arXiv 2305.13245), with MHA and MQA as its extremes.

    One matrix product makes queries, keys and values. Qwen2 adds a bias to it; Qwen3 normalises the heads
    before they are rotated, Hunyuan after. With cross-layer attention (CLA, arXiv 2405.12981) some layers
    compute only queries and use an earlier layer's keys and values. As each of these layers has a key norm
    with its own weight, the shared keys are stored without any such weight, and each layer multiplies its
    queries with its weight instead, which gives the same scores.
    """

    ops: Ops = CPU

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        self.norm_after = config.qk_norm == "after"
        self.shares = config.share_kv > 1
        scale = (config.query_scalar or config.head_dim) ** -0.5
        self.layer = Layer(config.slot(layer), scale, config.window(layer), self.shares)
        self.keeps = config.keeps(layer)
        heads = config.heads + 2 * config.kv_heads * self.keeps
        projection = Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        setattr(self, "qkv" if self.keeps else "q", projection)
        self.out = Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        norm = RMSNormFromOne if config.norms_from_one else RMSNorm
        self.q_norm = norm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = norm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_NC: Tensor, rope: Rope, context: Context) -> Tensor:
        """Return the output of the layer, [N, C]."""
        if self.keeps:
            q_NHD, k_NKD, v_NKD = self._project(x_NC, rope)
        else:
            q_NHD = self.ops.rotate(self.q(x_NC).view(len(x_NC), -1, self.head_dim), rope)
            q_NHD = self._normalize_shared(q_NHD)
            k_NKD = None
            v_NKD = None
        return self.out(context.attend(self.layer, q_NHD, k_NKD, v_NKD).flatten(1))

    def _project(self, x_NC: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [N, H, D], keys and values [N, K, D]; queries and keys are normed and rotated."""
        heads_NHD = self.qkv(x_NC).view(len(x_NC), -1, self.head_dim)
        qk_NHD, v_NKD = heads_NHD.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None and not self.norm_after:
            q_NHD, k_NKD = qk_NHD.split([self.heads, self.kv_heads], dim=1)
            qk_NHD = torch.cat([self.q_norm(q_NHD), self.k_norm(k_NKD)], dim=1)
        q_NHD, k_NKD = self.ops.rotate(qk_NHD, rope).split([self.heads, self.kv_heads], dim=1)
        if self.norm_after and self.shares:
            q_NHD = self._normalize_shared(q_NHD)
            k_NKD = Normalize.apply(k_NKD, torch.ones_like(self.k_norm.weight), self.k_norm.eps)
        elif self.norm_after:
            q_NHD = self.q_norm(q_NHD)
            k_NKD = self.k_norm(k_NKD)
        return q_NHD, k_NKD, v_NKD

    def _normalize_shared(self, q_NHD: Tensor) -> Tensor:
        """Return the normalised queries [N, H, D], multiplied with the weight of this layer's key norm.

        The shared keys are stored without this weight. Without norms the queries are returned unchanged.
        """
        if self.q_norm is None:
            return q_NHD
        return self.q_norm(q_NHD) * self.k_norm.weight


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437, eq. 1-11).

    Keys and values are made from one latent vector per token, and a rotated key that all heads share. For
    whole sequences, keys and values are written out. Over a cache, which holds only latents and rotated keys,
    the two matrix products that would compute them are absorbed into the queries and the output. A card
    computes whole sequences in the absorbed form, too, and only their gradients from what is written out
    (`ops.attend`).
    """

    ops: Ops = CPU

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        latent = config.latent
        self.latent = latent
        self.heads = config.heads
        key_dim = latent.nope_dim + latent.rope_dim
        self.query_width = latent.q_rank or config.heads * key_dim
        widths = self.query_width + latent.kv_rank + latent.rope_dim
        projection = Linear(config.hidden_size, widths, bias=False)
        if latent.q_rank:
            self.q_latent = projection
            self.q_norm = RMSNorm(latent.q_rank, 1e-6)
            self.q_up = Linear(latent.q_rank, config.heads * key_dim, bias=False)
        else:
            self.q_full = projection
        self.kv_norm = RMSNorm(latent.kv_rank, 1e-6)
        self.kv_up = Linear(latent.kv_rank, config.heads * (latent.nope_dim + latent.value_dim), bias=False)
        self.out = Linear(config.heads * latent.value_dim, config.hidden_size, bias=False)
        scale = key_dim**-0.5 * yarn_attention_scale(config.rope_scaling) ** 2
        self.layer = Layer(config.slot(layer), scale, config.window(layer))

    def forward(self, x_NC: Tensor, rope: Rope, context: Context) -> Tensor:
        """Return the output of the layer, [N, C]."""
        q_nope_NHD, q_rope_NHD, latent_NR, k_rope_N1D = self._project(x_NC, rope)
        up_HDR = self.kv_up.weight.view(self.heads, -1, self.latent.kv_rank)
        ups = up_HDR.split([self.latent.nope_dim, self.latent.value_dim], dim=1)
        latents = Latents(torch.cat([latent_NR.unsqueeze(1), k_rope_N1D], dim=-1), *ups)
        if context.absorbed:
            return self._attend_absorbed(q_nope_NHD, q_rope_NHD, latents, context)
        kv_NHD = self.kv_up(latent_NR).view(len(x_NC), self.heads, -1)
        k_nope_NHD, v_NHD = kv_NHD.split([self.latent.nope_dim, self.latent.value_dim], dim=-1)
        k_NHD = torch.cat([k_nope_NHD, k_rope_N1D.expand(-1, self.heads, -1)], dim=-1)
        q_NHD = torch.cat([q_nope_NHD, q_rope_NHD], dim=-1)
        mixed_NHD = context.attend(self.layer, q_NHD, k_NHD, v_NHD, latents)
        return self.out(mixed_NHD.flatten(1))

    def _project(self, x_NC: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return unrotated and rotated queries [N, H, D], the latent [N, R], the rotated key [N, 1, D].

        The latent is normalised.
        """
        latent = self.latent
        projection = self.q_latent if latent.q_rank else self.q_full
        widths = [self.query_width, latent.kv_rank, latent.rope_dim]
        q_NR, latent_NR, k_rope_ND = projection(x_NC).split(widths, dim=-1)
        if latent.q_rank:
            q_NR = self.q_up(self.q_norm(q_NR))
        q_NHD = q_NR.view(len(x_NC), self.heads, -1)
        q_nope_NHD, q_rope_NHD = q_NHD.split([latent.nope_dim, latent.rope_dim], dim=-1)
        k_rope_N1D = self.ops.rotate(k_rope_ND.unsqueeze(1), rope)
        return q_nope_NHD, self.ops.rotate(q_rope_NHD, rope), self.kv_norm(latent_NR), k_rope_N1D

    def _attend_absorbed(
        self, q_nope_NHD: Tensor, q_rope_NHD: Tensor, latents: Latents, context: Context
    ) -> Tensor:
        """Return the output of the layer [N, C], with the cached latents in place of keys and values."""
        q_NHD = self.ops.absorb(q_nope_NHD, q_rope_NHD, latents.up_key_HDR)
        mixed_NHR = context.attend(self.layer, q_NHD, latents.cached_N1D, None)
        return self.out(self.ops.per_head(mixed_NHR, latents.up_value_HDR).flatten(1))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    ops: Ops = CPU

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., C] normalised over its last dimension."""
        return self.ops.norm(x, self.weight, self.eps)

    def add(self, x_NC: Tensor, delta_NC: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm, both [N, C]; without `delta_NC`, x and its norm."""
        return self.ops.add_norm(x_NC, delta_NC, self.weight, self.eps)


class RMSNormFromOne(RMSNorm):
    """x / rms(x) * (1 + weight), as in Gemma, whose weights begin at zero. The sum is made in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., C] normalised over its last dimension."""
        return self.ops.norm(x, self._scale_C(), self.eps)

    def add(self, x_NC: Tensor, delta_NC: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm, both [N, C]; without `delta_NC`, x and its norm."""
        return self.ops.add_norm(x_NC, delta_NC, self._scale_C(), self.eps)

    def _scale_C(self) -> Tensor:
        """Return the factors [C], in float32 or better."""
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


def yarn_attention_scale(scaling: dict) -> float:
    """Return the factor of the attention scores of DeepSeek's variant of YaRN, before it is squared.

    See arXiv 2309.00071, eq. 22. It is 1 without YaRN.
    """
    all_dims = scaling.get("mscale_all_dim")
    return yarn_mscale(scaling["factor"], all_dims) if all_dims else 1.0


def yarn_mscale(factor: float, slope: float = 1.0) -> float:
    """Return YaRN's factor for positions stretched by `factor`: 0.1 * slope * ln(factor) + 1.

    See arXiv 2309.00071, eq. 22. It is 1 if `factor` is at most 1.
    """
    if factor <= 1:
        return 1.0
    return 0.1 * slope * math.log(factor) + 1.0
