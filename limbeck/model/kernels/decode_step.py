"""One decode step as a single call into the kernels: all layers of a dense decoder, one token per row.

A row: one sequence that is being decoded, in a `KVCache`. B rows · C hidden size.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..decoder import Decoder
from ..kv_cache import KVCache
from .build import library
from .choice import serves
from .operations import fields, pointer

_ATTENTION = ("attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_norm")
_WEIGHTS = (*_ATTENTION, "ffn_norm", "gate_up", "down", "down_norm", "cos", "sin")
_SIZES = ("layers", "rows", "hidden", "heads", "kv_heads", "width", "intermediate", "room", "threads")
_SWITCHES = ("gelu", "from_one")
_INPUTS = ("embed", "norm", "tokens", "positions", "lenders", "shared")
_SCRATCH = ("x", "normed", "qkv", "mixed", "gate_up", "inner")
FLOAT_BYTES = 4  # bytes of a float32


class _Layer(ctypes.Structure):
    """The C structure of one layer, as `decoding.hpp` reads it: its weights and its part of the cache."""

    _fields_ = [
        *fields(ctypes.c_void_p, *_WEIGHTS, "keys", "values"),
        *fields(ctypes.c_int64, "window"),
        *fields(ctypes.c_float, "scale", "eps"),
    ]


class _Step(ctypes.Structure):
    """The C structure of one decode step, as `decoding.hpp` reads it: sizes, inputs and scratch memory."""

    _fields_ = [
        *fields(ctypes.c_int64, *_SIZES, *_SWITCHES),
        *fields(ctypes.c_void_p, *_INPUTS),
        *fields(ctypes.c_void_p, *_SCRATCH),
        *fields(ctypes.c_float, "eps", "embed_scale"),
    ]


class DecodeStep:
    """The decode step of a dense decoder in compiled code, one token per row, over a `KVCache`.

    It holds pointers to the decoder's weights, so these must stay at the same place in memory.
    """

    def __init__(self, model: Decoder):
        config = model.config
        self.model = model
        self.layers = (_Layer * config.layers)(*(_layer(model, layer) for layer in range(config.layers)))
        self.widths = (
            config.hidden_size,
            config.hidden_size,
            (config.heads + 2 * config.kv_heads) * config.head_dim,
            config.heads * config.head_dim,
            2 * config.intermediate_size,
            config.intermediate_size,
        )
        self.scratch: list[Tensor] = []
        self._stores: tuple[int, ...] | None = None  # where the cache lies that the layers point into

    @staticmethod
    def fits(model: Decoder) -> bool:
        """Return True if the kernels support `model`'s architecture and their step is faster than torch's.

        They support Llama's layers with biases of queries, keys and values, heads that are normalised before
        their rotation, and sliding windows, and Gemma 3's.
        """
        config = model.config
        if config.experts or config.latent or config.parallel or config.layer_norm:
            return False
        if config.share_kv > 1 or config.qk_norm == "after":
            return False
        if not config.gated or config.rope_dim != config.head_dim:
            return False
        return serves("decode", config.hidden_size, model.embed.weight)

    def __call__(self, tokens_B: Tensor, cache: KVCache) -> Tensor:
        """Return the hidden states [B, C] from which the tokens after `tokens_B` are predicted.

        `cache` must have been advanced by one token.
        """
        rows = len(tokens_B)
        weight = self.model.embed.weight
        if not self.scratch or len(self.scratch[0]) < rows:
            self.scratch = [weight.new_empty(rows, width) for width in self.widths]
        self._point_at(cache)
        out_BC = weight.new_empty(rows, self.model.config.hidden_size)
        step = _Step(
            *self._sizes(rows, cache),
            self.model.config.gelu,
            self.model.config.norms_from_one,
            *self._inputs(tokens_B, cache),
            *(scratch.data_ptr() for scratch in self.scratch),
            self.model.norm.eps,
            self.model.embed_scale,
        )
        library().decode(ctypes.byref(step), self.layers, pointer(out_BC))
        return out_BC

    def _sizes(self, rows: int, cache: KVCache) -> tuple[int, ...]:
        """Return the values of the fields `_SIZES`, in this order."""
        config = self.model.config
        return (
            config.layers,
            rows,
            config.hidden_size,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.intermediate_size,
            cache.v_LBKTD.shape[3],
            torch.get_num_threads(),
        )

    def _inputs(self, tokens_B: Tensor, cache: KVCache) -> tuple[int, ...]:
        """Return the addresses in memory of the fields `_INPUTS`, in this order."""
        model = self.model
        return (
            model.embed.weight.data_ptr(),
            model.norm.weight.data_ptr(),
            tokens_B.data_ptr(),
            cache.positions.data_ptr(),
            cache.prefix_owner.ctypes.data,
            cache.shared.ctypes.data,
        )

    def _point_at(self, cache: KVCache) -> None:
        """Set the addresses of every layer's keys and values, which change when the cache is reallocated."""
        keys = cache.k_LBKnDP
        values = cache.v_LBKTD
        stores = keys.data_ptr(), values.data_ptr(), keys.stride(0), values.stride(0)
        if stores == self._stores:
            return
        self._stores = stores
        first_key, first_value, key_stride, value_stride = stores
        for slot, layer in enumerate(self.layers):
            layer.keys = first_key + FLOAT_BYTES * slot * key_stride
            layer.values = first_value + FLOAT_BYTES * slot * value_stride


def _layer(model: Decoder, number: int) -> _Layer:
    """Return the C structure of one block; the addresses of its keys and values are not yet set."""
    block = model.blocks[number]
    attention = block.attention
    cos, sin = model.rotations(number)
    weights = (
        block.attention_norm.weight,
        attention.qkv.weight,
        attention.qkv.bias,
        attention.q_norm and attention.q_norm.weight,
        attention.k_norm and attention.k_norm.weight,
        attention.out.weight,
        block.attention_post_norm and block.attention_post_norm.weight,
        block.ffn_norm.weight,
        block.ffn.gate_up.weight,
        block.ffn.down.weight,
        block.ffn_post_norm and block.ffn_post_norm.weight,
        cos,
        sin,
    )
    addresses = (None if weight is None else weight.data_ptr() for weight in weights)
    layer = attention.layer
    return _Layer(*addresses, None, None, layer.window, layer.scale, block.attention_norm.eps)
