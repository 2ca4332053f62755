"""Matrix products whose order of summation does not depend on the number of rows. M rows · N columns · K inputs.

Every element of a result is a sum over K in blocks of `BLOCK_K`, from the first to the last; only the sizes of
the tiles follow M, and they do not change the bits (`python -m bench.gpu tiles`). A weight with many inputs is
cut into spans of inputs (`span`): each span is summed by itself and the spans are added in order. With few
rows the spans are computed side by side, with many one after the other, with the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_K = 64
SPAN = 1024  # inputs of a span, at least


@triton.jit(do_not_specialize=["M", "spans"])
def _linear(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    span,
    x_stride,
    w_stride,
    y_stride,
    part_stride,
    spans,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MANY: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    width = GROUP * tiles_n
    first_m = pid // width * GROUP
    size_m = tl.minimum(tiles_m - first_m, GROUP)
    tile_m = first_m + pid % width % size_m
    tile_n = pid % width // size_m
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_tile = w_ptr + columns.to(tl.int64)[:, None] * w_stride + inner[None, :]
    x_mask = rows[:, None] < M
    w_mask = columns[:, None] < N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    begin = part * span
    for _ in range(spans):
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        end = tl.minimum(begin + span, K)
        for k in range(begin, end, BLOCK_K):
            ahead = inner[None, :] < end - k
            x = tl.load(x_tile + k, mask=x_mask & ahead, other=0.0)
            w = tl.load(w_tile + k, mask=w_mask & ahead, other=0.0)
            sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
        total = total + sums if MANY else sums
        begin += span
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        total += bias.to(tl.float32)[None, :]
    y = y_ptr + part.to(tl.int64) * part_stride + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=x_mask & (columns[None, :] < N))


@triton.jit
def _add_spans(parts_ptr, bias_ptr, y_ptr, size, N, SPANS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(SPANS):
        total += tl.load(parts_ptr + part * size + at, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


def span(inputs: int) -> int:
    """Return the inputs of one span of a weight, a multiple of `BLOCK_K`: a function of the weight alone."""
    spans = max(1, min(8, inputs // SPAN))
    return triton.cdiv(triton.cdiv(inputs, spans), BLOCK_K) * BLOCK_K


TUNED: dict[str, tuple[int, int, int, int, int]] = {}


def bucket(rows: int) -> int:
    """Return the number of rows for which a product of so many rows is tuned."""
    return next((most for most in (1, 16, 32, 64, 128, 256, 512, 2048) if rows <= most), 8192)


def tiles(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Return a tile's rows and columns, its warps, and the stages of its pipeline."""
    if rows <= 16:
        return 16, 16 if columns < 4096 else 32, 2, 5
    if rows <= 32:
        return 32, 16 if columns < 4096 else 32, 4, 5
    if rows <= 64:
        return 64, 16 if columns < 4096 else 32 if columns < 9216 else 64, 4, 5
    if rows <= 128:
        return 64, 32 if columns < 4096 else 64, 4, 5
    if rows <= 512:
        return 64, 64, 4, 4
    return 128, 128, 8, 4


def linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tile: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """Return x @ weight.T + bias [M, N] in `dtype` (None: that of x), summed in float32."""
    rows, inputs = x_MK.shape
    columns = len(weight_NK)
    dtype = dtype or x_MK.dtype
    y_MN = x_MK.new_empty(rows, columns, dtype=dtype)
    if not rows:
        return y_MN
    each = span(inputs)
    spans = triton.cdiv(inputs, each)
    tuned = tile or TUNED.get(f"{bucket(rows)} {columns} {inputs}")
    if tuned:
        block_m, block_n, warps, stages, split = tuned
        beside = bool(split) and spans > 1
    else:
        block_m, block_n, warps, stages = tiles(rows, columns)
        beside = spans > 1 and triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) < 128
    out = x_MK.new_empty(spans, rows, columns, dtype=torch.float32) if beside else y_MN
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n), spans if beside else 1)
    _linear[grid](
        x_MK,
        weight_NK,
        None if beside else bias_N,
        out,
        rows,
        columns,
        inputs,
        each,
        x_MK.stride(0),
        weight_NK.stride(0),
        columns,
        rows * columns,
        1 if beside else spans,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        HAS_BIAS=bias_N is not None and not beside,
        MANY=spans > 1 and not beside,
        GROUP=8,
        num_warps=warps,
        num_stages=stages,
    )
    if beside:
        size = rows * columns
        _add_spans[(triton.cdiv(size, 256),)](
            out, bias_N, y_MN, size, columns, SPANS=spans, HAS_BIAS=bias_N is not None, BLOCK=256, num_warps=2
        )
    return y_MN
