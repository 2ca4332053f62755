"""Operations on single rows: norms, rotation, SwiGLU.

N tokens · C hidden size · H heads · K key heads · D head size · I intermediate size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.table import Pool

WIDE = 2048  # values of a row from which four warps are too few
PARTS = 1024  # programs of a backward pass, each of which sums the weight's gradient over neighbouring rows


@triton.jit
def _norm(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, y_ptr, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    x = tl.load(x_ptr + row * width + at, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * width + at, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + at, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + at, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=mask)


def norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Return RMSNorm of x [..., C]."""
    y = torch.empty_like(x)
    _launch_norm(x, None, weight_C, eps, y, y)
    return y


def add_norm(x: Tensor, more: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + more and its RMSNorm, both [..., C]."""
    total = torch.empty_like(x)
    y = torch.empty_like(x)
    _launch_norm(x, more, weight_C, eps, total, y)
    return total, y


def _launch_norm(
    x: Tensor, more: Tensor | None, weight_C: Tensor, eps: float, total: Tensor, y: Tensor
) -> None:
    """Write x + more to `total`, if `more` is given, and the norm to `y`, all [..., C]."""
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _norm[(x.numel() // width,)](
        x,
        more,
        weight_C,
        total,
        y,
        width,
        eps,
        ADD=more is not None,
        BLOCK=block,
        num_warps=4 if block <= WIDE else 8,
    )


@triton.jit
def _norm_backward(
    grad_ptr, more_ptr, x_ptr, weight_ptr, by_x_ptr, parts_ptr, rows, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < width
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    by_weight = tl.zeros((BLOCK,), tl.float32)
    each = tl.cdiv(rows, tl.num_programs(0))
    first = part.to(tl.int64) * each
    for row in range(tl.minimum(each, rows - part * each)):
        place = (first + row) * width + at
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        unit = x * scale
        weighted = grad * weight
        by_x = (weighted - unit * (tl.sum(weighted * unit, 0) / width)) * scale
        if ADD:
            by_x += tl.load(more_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(by_x_ptr + place, by_x.to(by_x_ptr.dtype.element_ty), mask=mask)
        by_weight += grad * unit
    tl.store(parts_ptr + part.to(tl.int64) * width + at, by_weight, mask=mask)


def norm_backward(
    grad: Tensor, x: Tensor, weight_C: Tensor, eps: float, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of RMSNorm by x [..., C], to which `more` is added, and by the weight [C]."""
    width = x.shape[-1]
    rows = x.numel() // width
    by_x = torch.empty_like(x)
    count = min(PARTS, rows)
    parts = weight_C.new_empty(count, width, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _norm_backward[(count,)](
        grad, more, x, weight_C, by_x, parts, rows, width, eps, ADD=more is not None, BLOCK=block,
        num_warps=4 if block <= WIDE else 8,
    )  # fmt: skip
    return by_x, parts.sum(0).to(weight_C.dtype)


@triton.jit
def _swiglu(both_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    gate = tl.load(both_ptr + row * 2 * width + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * width + width + at, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * width + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def swiglu(both_NI: Tensor) -> Tensor:
    """Return silu(gate) * up [N, I] of the two halves of the last dimension."""
    rows, width = both_NI.shape[0], both_NI.shape[1] // 2
    y_NI = both_NI.new_empty(rows, width)
    _swiglu[(rows, triton.cdiv(width, 1024))](both_NI, y_NI, width, BLOCK=1024, num_warps=4)
    return y_NI


@triton.jit
def _swiglu_backward(grad_ptr, both_ptr, by_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    grad = tl.load(grad_ptr + row * width + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(both_ptr + row * 2 * width + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * width + width + at, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    by_gate = grad * up * (share + silu * (1.0 - share))
    tl.store(by_ptr + row * 2 * width + at, by_gate.to(by_ptr.dtype.element_ty), mask=mask)
    tl.store(by_ptr + row * 2 * width + width + at, (grad * silu).to(by_ptr.dtype.element_ty), mask=mask)


def swiglu_backward(grad_NI: Tensor, both_NI: Tensor) -> Tensor:
    """Return the gradient of SwiGLU by gate and up, side by side [N, 2 I]."""
    by_NI = torch.empty_like(both_NI)
    rows, width = grad_NI.shape
    _swiglu_backward[(rows, triton.cdiv(width, 1024))](
        grad_NI, both_NI, by_NI, width, BLOCK=1024, num_warps=4
    )
    return by_NI


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, heads, x_stride, head_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    half: tl.constexpr = D // 2
    at = tl.arange(0, BLOCK)[None, :]
    mask = (head < heads) & (at < half)
    source = x_ptr + token * x_stride + head * head_stride + at
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * D + at, mask=at < half, other=0.0)
    sin = tl.load(sin_ptr + token * D + half + at, mask=at < half, other=0.0)
    target = y_ptr + token * heads * D + head * D + at
    tl.store(target, (low * cos - high * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(target + half, (high * cos + low * sin).to(y_ptr.dtype.element_ty), mask=mask)


def rotate(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Return the heads [N, H, D] rotated by the angles [N, 1, D] of `decoder.rope_table`, in float32."""
    tokens, heads, width = x_NHD.shape
    y_NHD = x_NHD.new_empty(tokens, heads, width)
    if x_NHD.stride(2) != 1:
        x_NHD = x_NHD.contiguous()
    _rotate[(tokens,)](
        x_NHD, cos_N1D, sin_N1D, y_NHD, heads, x_NHD.stride(0), x_NHD.stride(1), D=width,
        BLOCK=triton.next_power_of_2(width // 2), HEADS=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    return y_NHD


@triton.jit
def _store(
    k_ptr, v_ptr, slots_ptr, keys_ptr, values_ptr, k_stride, v_stride, size,
    HAS_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < size
    tl.store(keys_ptr + slot * size + at, tl.load(k_ptr + token * k_stride + at, mask=mask), mask=mask)
    if HAS_V:
        tl.store(values_ptr + slot * size + at, tl.load(v_ptr + token * v_stride + at, mask=mask), mask=mask)


def store(k_NKD: Tensor, v_NKD: Tensor | None, slots_N: Tensor, pool: Pool) -> None:
    """Write the keys and values of new tokens [N, K, D] to the places `slots_N` of a pool.

    Without values only the keys are written.
    """
    keys, values = pool
    size = k_NKD.shape[1] * k_NKD.shape[2]
    _store[(len(k_NKD),)](
        k_NKD, v_NKD, slots_N, keys, values, k_NKD.stride(0), 0 if v_NKD is None else v_NKD.stride(0), size,
        HAS_V=v_NKD is not None, BLOCK=triton.next_power_of_2(size), num_warps=2,
    )  # fmt: skip
