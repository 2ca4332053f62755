"""The kernels as functions of torch: autograd functions, and operations without a gradient.

N tokens · B rows · H heads · K key/value heads, or experts of a token · D head size · C hidden size · V
vocabulary · E experts · I intermediate size · M = N x K choices, one for each token and expert.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .build import library

WAYS = ("blas", "dots", "strips")  # algorithms of a product, numbered as in products.hpp
FASTEST = -1  # in place of an index into WAYS: the one that was measured as fastest


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Return the address of a tensor of any shape [...], in the type that the kernels take."""
    return ctypes.c_void_p(tensor.data_ptr())


def fields(kind: type, *names: str) -> list[tuple[str, type]]:
    """Return entries of `ctypes.Structure._fields_` with these names, all of the C type `kind`."""
    return [(name, kind) for name in names]


# ---------------------------------------------------------------- row by row


class Normalize(torch.autograd.Function):
    """RMSNorm: x / rms(x) * weight over the last dimension."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        """Return x [..., C] normalised over its last dimension and multiplied by weight [C]."""
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        y = torch.empty_like(x)
        scale = x.new_empty(rows)
        library().norm_forward(
            pointer(x),
            pointer(weight),
            ctypes.c_float(eps),
            ctypes.c_int64(rows),
            width,
            pointer(y),
            pointer(scale),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients with respect to x [..., C] and to the weight [C]."""
        x, weight, scale = ctx.saved_tensors
        grad = grad.contiguous()
        threads = torch.get_num_threads()
        by_x = torch.empty_like(x)
        by_weight = x.new_zeros(threads, x.shape[-1])  # one sum per thread
        library().norm_backward(
            pointer(grad),
            pointer(x),
            pointer(weight),
            pointer(scale),
            ctypes.c_int64(len(scale)),
            x.shape[-1],
            pointer(by_x),
            pointer(by_weight),
            threads,
        )
        return by_x, by_weight.sum(0), None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, where gate and up are the two halves of the last dimension."""

    @staticmethod
    def forward(ctx, gate_up):
        """Return silu(gate) * up [..., I] of the two halves of gate_up [..., 2 I]."""
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], width)
        rows = ctypes.c_int64(y.numel() // width)
        library().swiglu_forward(pointer(gate_up), rows, width, pointer(y), torch.get_num_threads())
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient with respect to gate_up [..., 2 I]."""
        (gate_up,) = ctx.saved_tensors
        grad = grad.contiguous()
        by_both = torch.empty_like(gate_up)
        width = grad.shape[-1]
        rows = ctypes.c_int64(grad.numel() // width)
        library().swiglu_backward(
            pointer(grad), pointer(gate_up), rows, width, pointer(by_both), torch.get_num_threads()
        )
        return by_both


class Rotate(torch.autograd.Function):
    """Rotation of heads x [N, H, D] by the angles of their tokens' positions.

    The angles are given as cos and sin [N, 1, D], in the form of `decoder.rope_table`: the first half of sin
    is negated.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        """Return the rotated heads, [N, H, D]."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient with respect to x [N, H, D]: a rotation in the opposite direction."""
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def _rotate(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, direction: float) -> Tensor:
    """Return the heads [N, H, D] rotated forwards (`direction` 1) or backwards (-1)."""
    x_NHD = _heads_side_by_side(x_NHD)
    rows, heads, width = x_NHD.shape
    y_NHD = x_NHD.new_empty(rows, heads, width)
    library().rotate(
        pointer(x_NHD),
        ctypes.c_int64(x_NHD.stride(0)),
        pointer(cos_N1D),
        pointer(sin_N1D),
        ctypes.c_float(direction),
        ctypes.c_int64(rows),
        heads,
        width,
        pointer(y_NHD),
        torch.get_num_threads(),
    )
    return y_NHD


def _heads_side_by_side(x_NHD: Tensor) -> Tensor:
    """Return heads [N, H, D] such that all heads of one token are contiguous in memory.

    The tokens may be any distance apart. Copies only if necessary.
    """
    if x_NHD.stride(2) == 1 and x_NHD.stride(1) == x_NHD.shape[2]:
        return x_NHD
    return x_NHD.contiguous()


# ---------------------------------------------------------------- attention over whole sequences


class _Trees(ctypes.Structure):
    """The C structure of `Trees`, as `attention.hpp` reads it."""

    _fields_ = [
        *fields(ctypes.c_int, "count"),
        *fields(ctypes.c_void_p, "trunk", "length", "first", "branch", "branch_length"),
    ]


class _Inputs(ctypes.Structure):
    """The C structure of the inputs of attention, as `attention.hpp` reads it."""

    _fields_ = [
        *fields(ctypes.c_void_p, "q", "k", "v"),
        *fields(ctypes.c_int64, "q_stride", "k_stride", "v_stride"),
        *fields(ctypes.c_int, "heads", "kv_heads", "width", "window"),
        *fields(ctypes.c_float, "scale"),
    ]


class Trees:
    """Sequences that share beginnings, as trees: a trunk (a prompt) with branches (its completions).

    `trunks` and `lengths` are the index of the first token and the number of tokens of each trunk, `branches`
    and `branch_lengths` the same of all branches, in the order of their trunks, and `counts` the number of
    branches of each trunk (None: there are no branches). One object serves all layers, in forward and
    backward pass.
    """

    def __init__(
        self,
        trunks: Sequence[int],
        lengths: Sequence[int],
        counts: Sequence[int] | None = None,
        branches: Sequence[int] = (),
        branch_lengths: Sequence[int] = (),
    ):
        first = np.cumsum([0, *(counts or [0] * len(trunks))])
        parts = (trunks, lengths, first, branches, branch_lengths)
        self._arrays = [np.asarray(part, dtype=np.int32) for part in parts]
        self.laid = _Trees(len(trunks), *(array.ctypes.data for array in self._arrays))


class Attention(torch.autograd.Function):
    """Causal attention in trees: each token attends to its trunk and to its own branch up to itself.

    q is [N, H, D], k and v are [N, K, D].
    """

    @staticmethod
    def forward(ctx, q, k, v, trees, scale, window):
        """Return the mixed values, [N, H, D].

        `scale` multiplies the scores; `window` is the number of positions that a token sees (0: all).
        """
        q, k, v = (_heads_side_by_side(x) for x in (q, k, v))
        out = q.new_empty(q.shape)
        logsumexp = q.new_empty(q.shape[:2])
        inputs = _attention_inputs((q, k, v), scale, window)
        library().attention_forward(
            ctypes.byref(trees.laid),
            ctypes.byref(inputs),
            pointer(out),
            pointer(logsumexp),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(q, k, v, logsumexp)
        ctx.settings = trees, scale, window
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients with respect to q [N, H, D], and to k and v [N, K, D]."""
        q, k, v, logsumexp = ctx.saved_tensors
        trees, scale, window = ctx.settings
        grad = grad.contiguous()
        by_q, by_k, by_v = (x.new_empty(x.shape) for x in (q, k, v))
        inputs = _attention_inputs((q, k, v), scale, window)
        library().attention_backward(
            ctypes.byref(trees.laid),
            ctypes.byref(inputs),
            pointer(grad),
            pointer(logsumexp),
            pointer(by_q),
            pointer(by_k),
            pointer(by_v),
            torch.get_num_threads(),
        )
        return by_q, by_k, by_v, None, None, None


def _attention_inputs(qkv: tuple[Tensor, Tensor, Tensor], scale: float, window: int) -> _Inputs:
    """Return the C structure of the tensors q [N, H, D], k and v [N, K, D] and their settings."""
    q_NHD, k_NKD, _ = qkv
    addresses = (x.data_ptr() for x in qkv)
    strides = (x.stride(0) for x in qkv)
    _, heads, width = q_NHD.shape
    return _Inputs(*addresses, *strides, heads, k_NKD.shape[1], width, window, scale)


# ---------------------------------------------------------------- a mixture of experts


class _Experts(ctypes.Structure):
    """The C structure of a mixture of experts, as `experts.hpp` reads it."""

    _fields_ = [
        *fields(ctypes.c_int64, "tokens", "count", "top_k", "hidden", "width", "threads"),
        *fields(ctypes.c_void_p, "x", "gate_up", "down", "weights", "order", "ends", "both"),
    ]


class Mixture(torch.autograd.Function):
    """The sum over each token's experts of weight x SwiGLU(x).

    x is [N, C], gate_up [E, 2 I, C], down [E, C, I], weights [N, K]. `order` [M] sorts the choices by expert,
    and the choices of expert e end at `ends[e]`.
    """

    @staticmethod
    def forward(ctx, x, gate_up, down, weights, order, ends):
        """Return the weighted sums of the experts' outputs, [N, C]."""
        x, gate_up, down, weights = (tensor.contiguous() for tensor in (x, gate_up, down, weights))
        both = x.new_empty(len(order), gate_up.shape[1])
        y = torch.empty_like(x)
        saved = x, gate_up, down, weights, order, ends, both
        library().experts_forward(ctypes.byref(_mixture(saved)), pointer(y))
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients by x [N, C], gate_up [E, 2 I, C], down [E, C, I] and weights [N, K]."""
        saved = ctx.saved_tensors
        grad = grad.contiguous()
        by_inputs = tuple(torch.empty_like(tensor) for tensor in saved[:4])
        library().experts_backward(ctypes.byref(_mixture(saved)), pointer(grad), *map(pointer, by_inputs))
        return *by_inputs, None, None


def _mixture(saved: Sequence[Tensor]) -> _Experts:
    """Return the C structure of the inputs of `Mixture`, x [N, C] and so on, and of its scratch memory."""
    x, _, down, weights, *_ = saved
    count, hidden, width = down.shape
    addresses = (tensor.data_ptr() for tensor in saved)
    return _Experts(len(x), count, weights.shape[1], hidden, width, torch.get_num_threads(), *addresses)


# ---------------------------------------------------------------- without a gradient


def linear(x_BC: Tensor, weight_VC: Tensor, way: int = FASTEST) -> Tensor:
    """Return x @ weight.T [B, V] without a gradient.

    `way` is an index into `WAYS`, the available algorithms; `FASTEST` takes the one that was measured as
    fastest.
    """
    x_BC = x_BC.contiguous()
    weight_VC = weight_VC.contiguous()
    y_BV = x_BC.new_empty(len(x_BC), len(weight_VC))
    sizes = map(ctypes.c_int, (len(x_BC), *weight_VC.shape))
    library().linear(way, pointer(x_BC), pointer(weight_VC), *sizes, pointer(y_BV), torch.get_num_threads())
    return y_BV


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return sampled tokens and their log-probabilities, both [B].

    The logits [B, V] are divided by `temperature`. `uniform_B` holds one random number from 0 to 1 per row;
    the row's token is the first at which the cumulative softmax exceeds it.
    """
    logits_BV = logits_BV.contiguous()
    uniform_B = uniform_B.contiguous()
    rows, count = logits_BV.shape
    tokens_B = torch.empty(rows, dtype=torch.long)
    logprobs_B = logits_BV.new_empty(rows)
    library().sample(
        pointer(logits_BV),
        pointer(uniform_B),
        ctypes.c_int64(rows),
        ctypes.c_int64(count),
        ctypes.c_float(temperature),
        pointer(tokens_B),
        pointer(logprobs_B),
        torch.get_num_threads(),
    )
    return tokens_B, logprobs_B
