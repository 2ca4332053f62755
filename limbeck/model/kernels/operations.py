"""The kernels as torch calls them: autograd functions, and what is computed without a gradient.

N tokens · B rows · H heads · K key/value heads · D head size · C hidden · V vocabulary · E experts · I intermediate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .build import library

WAYS = ("blas", "dots", "strips")  # of multiplying, as products.hpp numbers them
FASTEST = -1


def at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# ---------------------------------------------------------------- row by row


class Normalize(torch.autograd.Function):
    """x / rms(x) x weight over the last dimension."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        width = x.shape[-1]
        rows, y = x.numel() // width, torch.empty_like(x)
        scale = x.new_empty(rows)
        library().norm_forward(
            at(x),
            at(weight),
            ctypes.c_float(eps),
            ctypes.c_int64(rows),
            width,
            at(y),
            at(scale),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad, threads = grad.contiguous(), torch.get_num_threads()
        dx, dweight = torch.empty_like(x), x.new_zeros(threads, x.shape[-1])
        library().norm_backward(
            at(grad),
            at(x),
            at(weight),
            at(scale),
            ctypes.c_int64(len(scale)),
            x.shape[-1],
            at(dx),
            at(dweight),
            threads,
        )
        return dx, dweight.sum(0), None


class SwiGLU(torch.autograd.Function):
    """silu(gate) x up, of the two halves of the last dimension."""

    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], width)
        library().swiglu_forward(
            at(gate_up), ctypes.c_int64(y.numel() // width), width, at(y), torch.get_num_threads()
        )
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        grad, by_both = grad.contiguous(), torch.empty_like(gate_up)
        width = grad.shape[-1]
        rows = ctypes.c_int64(grad.numel() // width)
        library().swiglu_backward(at(grad), at(gate_up), rows, width, at(by_both), torch.get_num_threads())
        return by_both


class Rotate(torch.autograd.Function):
    """x [N, H, D] turned by its token's angles, cos and signed sin [N, 1, D]."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return _turned(grad, *ctx.saved_tensors, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sense: float) -> Tensor:
    x = _heads(x)
    rows, heads, width = x.shape
    y = x.new_empty(rows, heads, width)
    library().rotate(
        at(x),
        ctypes.c_int64(x.stride(0)),
        at(cos),
        at(sin),
        ctypes.c_float(sense),
        ctypes.c_int64(rows),
        heads,
        width,
        at(y),
        torch.get_num_threads(),
    )
    return y


def _heads(x_NHD: Tensor) -> Tensor:
    """With its heads side by side, however far its rows are apart."""
    return x_NHD if x_NHD.stride(2) == 1 and x_NHD.stride(1) == x_NHD.shape[2] else x_NHD.contiguous()


# ---------------------------------------------------------------- attention over whole sequences


class _Trees(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("trunk", "length", "first", "branch", "branch_length")),
    ]


class _Asked(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in "qkv"),
        *((f"{name}_stride", ctypes.c_int64) for name in "qkv"),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "width", "window")),
        ("scale", ctypes.c_float),
    ]


class Trees:
    """Sequences as trees: token and length of each trunk; branches in order, and how many each trunk has. Laid down
    once, as the kernels read them, for all layers and both directions."""

    def __init__(
        self,
        trunks: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int] | None = None,
        branches: Sequence[int] = (),
        branch_lengths: Sequence[int] = (),
    ):
        first = np.cumsum([0, *(counts or [0] * len(trunks))])
        self._arrays = [
            np.asarray(part, dtype=np.int32) for part in (trunks, lengths, first, branches, branch_lengths)
        ]
        self.laid = _Trees(len(trunks), *(array.ctypes.data for array in self._arrays))


class Attention(torch.autograd.Function):
    """Causal attention along every path from a trunk's begin to a branch's end: q [N, H, D], k and v [N, K, D]."""

    @staticmethod
    def forward(ctx, q, k, v, trees, scale, window):
        q, k, v = (_heads(x) for x in (q, k, v))
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2])
        asked = Attention.asked(q, k, v, scale, window)
        library().attention_forward(
            ctypes.byref(trees.laid), ctypes.byref(asked), at(out), at(lse), torch.get_num_threads()
        )
        ctx.save_for_backward(q, k, v, lse)
        ctx.settings = trees, scale, window
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, lse = ctx.saved_tensors
        trees, scale, window = ctx.settings
        grad = grad.contiguous()
        by_q, by_k, by_v = (x.new_empty(x.shape) for x in (q, k, v))
        asked = Attention.asked(q, k, v, scale, window)
        library().attention_backward(
            ctypes.byref(trees.laid),
            ctypes.byref(asked),
            at(grad),
            at(lse),
            at(by_q),
            at(by_k),
            at(by_v),
            torch.get_num_threads(),
        )
        return by_q, by_k, by_v, None, None, None

    @staticmethod
    def asked(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> _Asked:
        pointers, strides = (x.data_ptr() for x in (q, k, v)), (x.stride(0) for x in (q, k, v))
        return _Asked(*pointers, *strides, q.shape[1], k.shape[1], q.shape[2], window, scale)


# ---------------------------------------------------------------- a mixture of experts


class _Experts(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "count", "top_k", "hidden", "width", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "gate_up", "down", "weights", "order", "ends", "both")),
    ]


class Mixture(torch.autograd.Function):
    """Sum over each token's experts of weight x SwiGLU(x): x [N, C], gate_up [E, 2I, C], down [E, C, I], weights
    [N, K]; `order` [M] sorts the N x K choices by expert, and expert e's end at `ends[e]`."""

    @staticmethod
    def forward(ctx, x, gate_up, down, weights, order, ends):
        x, gate_up, down, weights = (t.contiguous() for t in (x, gate_up, down, weights))
        both, y = x.new_empty(len(order), gate_up.shape[1]), torch.empty_like(x)
        saved = x, gate_up, down, weights, order, ends, both
        library().experts_forward(ctypes.byref(Mixture.laid(saved)), at(y))
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, gate_up, down, weights, *_ = saved = ctx.saved_tensors
        grad = grad.contiguous()
        found = tuple(torch.empty_like(part) for part in (x, gate_up, down, weights))
        library().experts_backward(ctypes.byref(Mixture.laid(saved)), at(grad), *map(at, found))
        return *found, None, None

    @staticmethod
    def laid(saved: Sequence[Tensor]) -> _Experts:
        x, _, down, weights, *_ = saved
        count, hidden, width = down.shape
        pointers = (tensor.data_ptr() for tensor in saved)
        return _Experts(len(x), count, weights.shape[1], hidden, width, torch.get_num_threads(), *pointers)


# ---------------------------------------------------------------- without a gradient


def linear(x_BC: Tensor, weight_VC: Tensor, way: int = FASTEST) -> Tensor:
    """x @ weight^T [B, V], without a gradient, in the way that is known to be fastest; or in this one of `WAYS`."""
    x_BC, weight_VC = x_BC.contiguous(), weight_VC.contiguous()
    y_BV = x_BC.new_empty(len(x_BC), len(weight_VC))
    sizes = map(ctypes.c_int, (len(x_BC), *weight_VC.shape))
    library().linear(way, at(x_BC), at(weight_VC), *sizes, at(y_BV), torch.get_num_threads())
    return y_BV


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The first token at which the cumulative softmax passes the uniform number, and its log-probability."""
    logits_BV, uniform_B = logits_BV.contiguous(), uniform_B.contiguous()
    rows, count = logits_BV.shape
    tokens_B, logprobs_B = torch.empty(rows, dtype=torch.long), logits_BV.new_empty(rows)
    library().sample(
        at(logits_BV),
        at(uniform_B),
        ctypes.c_int64(rows),
        ctypes.c_int64(count),
        ctypes.c_float(temperature),
        at(tokens_B),
        at(logprobs_B),
        torch.get_num_threads(),
    )
    return tokens_B, logprobs_B
