"""A step of decoding as one call: every layer of a dense decoder, one token a row, over a `KVCache`."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .build import library
from .choice import serves
from .operations import at

if TYPE_CHECKING:
    from ..decoder import Decoder
    from ..kv_cache import KVCache

_WEIGHTS = ("attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "ffn_norm", "gate_up", "down")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_WEIGHTS, "keys", "values")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_int64)
            for n in (
                "layers",
                "rows",
                "hidden",
                "heads",
                "kv_heads",
                "width",
                "intermediate",
                "room",
                "threads",
            )
        ),
        *(
            (n, ctypes.c_void_p)
            for n in ("embed", "norm", "cos", "sin", "tokens", "positions", "lenders", "shared")
        ),
        *((n, ctypes.c_void_p) for n in ("x", "normed", "qkv", "mixed", "gate_up", "inner")),
        ("eps", ctypes.c_float),
    ]


class Decoding:
    """Steps of a dense decoder, one token a row, over a `KVCache`. Its weights must stay where they are."""

    def __init__(self, model: Decoder):
        self.model, config = model, model.config
        self.layers = (_Layer * config.layers)(*(self._layer(block) for block in model.blocks))
        asked = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.widths = (
            config.hidden_size,
            config.hidden_size,
            asked,
            config.heads * config.head_dim,
            2 * config.intermediate_size,
            config.intermediate_size,
        )
        self.scratch: list[Tensor] = []
        self.at = None

    @staticmethod
    def fits(model: Decoder) -> bool:
        """Whether a step is faster so, and is one that it knows: Llama's plan with its common additions, which are biases of
        q, k, v; normed heads; windows."""
        c = model.config
        plain = not (
            c.experts or c.latent or c.parallel or c.layer_norm or c.share_kv > 1 or c.qk_norm == "after"
        )
        return (
            plain
            and c.gated
            and c.rope_dim == c.head_dim
            and serves("decode", c.hidden_size, model.embed.weight)
        )

    def __call__(self, tokens_B: Tensor, cache: KVCache) -> Tensor:
        """The states [B, C] that predict the tokens after these."""
        model, config, rows = self.model, self.model.config, len(tokens_B)
        if not self.scratch or len(self.scratch[0]) < rows:
            self.scratch = [model.embed.weight.new_empty(rows, width) for width in self.widths]
        self._point(cache)
        out_BC = model.embed.weight.new_empty(rows, config.hidden_size)
        step = _Step(
            config.layers,
            rows,
            config.hidden_size,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.intermediate_size,
            cache.v_LBKTD.shape[3],
            torch.get_num_threads(),
            model.embed.weight.data_ptr(),
            model.norm.weight.data_ptr(),
            model.cos.data_ptr(),
            model.sin.data_ptr(),
            tokens_B.data_ptr(),
            cache.positions.data_ptr(),
            cache.prefix_owner.ctypes.data,
            cache.shared.ctypes.data,
            *(part.data_ptr() for part in self.scratch),
            model.norm.eps,
        )
        library().decode(ctypes.byref(step), self.layers, at(out_BC))
        return out_BC

    def _point(self, cache: KVCache) -> None:
        """Every layer at its keys and values; they move when the cache grows or shrinks."""
        keys, values = cache.k_LBKnDP, cache.v_LBKTD
        at = keys.data_ptr(), values.data_ptr(), keys.stride(0), values.stride(0)
        if at != self.at:
            for slot, layer in enumerate(self.layers):
                layer.keys, layer.values = at[0] + 4 * slot * at[2], at[1] + 4 * slot * at[3]
            self.at = at

    def _layer(self, block: torch.nn.Module) -> _Layer:
        attention, ffn = block.attention, block.ffn
        norms = (n and n.weight for n in (attention.q_norm, attention.k_norm))
        weights = (
            block.attention_norm.weight,
            attention.qkv.weight,
            attention.qkv.bias,
            *norms,
            attention.out.weight,
            block.ffn_norm.weight,
            ffn.gate_up.weight,
            ffn.down.weight,
        )
        pointers = (None if weight is None else weight.data_ptr() for weight in weights)
        return _Layer(
            *pointers, None, None, attention.layer.window, attention.layer.scale, block.attention_norm.eps
        )
