"""Matrix products whose order of summation does not depend on the number of rows.

Every element of a result is a sum over K in blocks of `BLOCK_K`, from the first to the last; only the sizes
of the tiles follow M, and they do not change the bits (`python -m bench.gpu products`). A weight with many
inputs is cut into spans of inputs (`span`): each span is summed by itself and the spans are added in order.
With few rows the spans are computed side by side, with many one after the other, with the same bits. M rows ·
N columns · K inputs · H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import stages

BLOCK_K = 64  # inputs of a block
SPAN = 1024  # inputs of a span, at least
MOST_SPANS = 8  # spans of a weight
WIDTH = 256  # values that `cumulate` sums at once
FLOAT32_TILE = 1 << 11  # values of a tile of float32, at most
HEAD = 1 << 16  # columns from which a weight is an output head


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
    w_inner,
    y_stride,
    part_stride,
    x_head,
    w_head,
    y_head,
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
    head = tl.program_id(2).to(tl.int64)
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
    x_tile = x_ptr + head * x_head + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]
    w_tile = w_ptr + head * w_head + columns.to(tl.int64)[:, None] * w_stride + inner[None, :] * w_inner
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
            w = tl.load(w_tile + k * w_inner, mask=w_mask & ahead, other=0.0)
            sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
        total = total + sums if MANY else sums
        begin += span
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        total += bias.to(tl.float32)[None, :]
    y_ptr += head * y_head + part.to(tl.int64) * part_stride
    y = y_ptr + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=x_mask & (columns[None, :] < N))


@triton.jit
def _add_spans(
    parts_ptr, bias_ptr, y_ptr, size, N, SPANS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
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
    spans = max(1, min(MOST_SPANS, inputs // SPAN))
    return triton.cdiv(triton.cdiv(inputs, spans), BLOCK_K) * BLOCK_K


class Tile(NamedTuple):
    """The rows and columns that one program computes, its warps, and the stages of its pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def choose_tile(rows: int, columns: int, inputs: int) -> Tile:
    """Return the tile of a product, as it was fastest on an H100 for the weights of four models (LOG.md)."""
    one_span = inputs <= span(inputs)
    if rows <= 64:
        return _tile_for_few(rows, columns, one_span)
    if rows <= 128:
        return Tile(64, 32 if columns < 4096 else 64, 4, 5)
    if rows > 512:
        return Tile(128, 256, 8, 3) if one_span else Tile(128, 128, 8, 4)
    if columns < 8192 and inputs < 8192:
        return Tile(64, 64, 4, 4)
    return Tile(128, 128, 4, 3) if columns > HEAD and one_span else Tile(128, 128, 8, 4)


def _tile_for_few(rows: int, columns: int, one_span: bool) -> Tile:
    """Return the tile of a product of at most 64 rows: the fewer columns, the narrower."""
    if rows <= 16:
        return Tile(16, 16 if columns < 4096 or columns > HEAD else 32, 2, 5)
    if rows <= 32:
        return Tile(32, 16 if columns < 4096 else 32, 4, 5)
    width = 16 if columns < 3072 else 32 if columns < 8192 else 64
    if not one_span:
        width = min(64, 2 * width)
    return Tile(64, width, 4, 4 if width == 64 else 5)


def fit(tile: Tile, x_MK: Tensor) -> Tile:
    """Return the tile with as many stages, and columns, as the card of x [M, K] has shared memory for.

    float32 is multiplied without tensor cores, in smaller tiles, which the compiler writes out in full.
    """
    if x_MK.element_size() > 2 and tile.rows * tile.columns > FLOAT32_TILE:
        tile = Tile(32, 64, 4, 2)
    count = stages(tile.stages, (tile.rows + tile.columns) * BLOCK_K * x_MK.element_size(), x_MK.device)
    if count < 2 and tile.columns > 64:
        return fit(tile._replace(columns=tile.columns // 2), x_MK)
    return tile._replace(stages=count)


def _side_by_side(rows: int, programs: int) -> bool:
    """Return True if the spans of a product are computed by programs of their own, because so many programs
    of a tile each leave processors idle."""
    return programs < (160 if rows <= 64 else 66)


def linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    beside: bool | None = None,
) -> Tensor:
    """Return x @ weight.T + bias [M, N] in `dtype` (None: that of x), summed in float32.

    `tile` and `beside`, which computes the spans side by side, follow the sizes unless they are given; the
    result does not depend on them.
    """
    rows, inputs = x_MK.shape
    columns = len(weight_NK)
    y_MN = x_MK.new_empty(rows, columns, dtype=dtype or x_MK.dtype)
    if not rows:
        return y_MN
    each = span(inputs)
    spans = triton.cdiv(inputs, each)
    tile = fit(tile or choose_tile(rows, columns, inputs), x_MK)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    if beside is None:
        beside = _side_by_side(rows, programs)
    beside = beside and spans > 1
    out = x_MK.new_empty(spans, rows, columns, dtype=torch.float32) if beside else y_MN
    _linear[(programs, spans if beside else 1, 1)](
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
        1,
        columns,
        rows * columns,
        0,
        0,
        0,
        1 if beside else spans,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=BLOCK_K,
        HAS_BIAS=bias_N is not None and not beside,
        MANY=spans > 1 and not beside,
        GROUP=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if beside:
        _sum_spans(out, bias_N, y_MN)
    return y_MN


def per_head(x_MHK: Tensor, weight_HNK: Tensor, tile: Tile | None = None) -> Tensor:
    """Return each head's product with its own weight, [M, H, N], in the dtype of x, summed in float32.

    The weight's last dimension need not be contiguous in memory. `tile` is as in `linear`.
    """
    rows, heads, inputs = x_MHK.shape
    columns = weight_HNK.shape[1]
    y_MHN = x_MHK.new_empty(rows, heads, columns)
    if not rows:
        return y_MHN
    if x_MHK.stride(2) != 1:
        x_MHK = x_MHK.contiguous()
    each = span(inputs)
    spans = triton.cdiv(inputs, each)
    tile = fit(tile or choose_tile(rows, columns, inputs), x_MHK)
    _linear[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), 1, heads)](
        x_MHK,
        weight_HNK,
        None,
        y_MHN,
        rows,
        columns,
        inputs,
        each,
        x_MHK.stride(0),
        weight_HNK.stride(1),
        weight_HNK.stride(2),
        heads * columns,
        0,
        x_MHK.stride(1),
        weight_HNK.stride(0),
        columns,
        spans,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=BLOCK_K,
        HAS_BIAS=False,
        MANY=spans > 1,
        GROUP=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y_MHN


def _sum_spans(parts: Tensor, bias_N: Tensor | None, y_MN: Tensor) -> None:
    """Write the sum of the spans' parts [spans, M, N] and the bias to y [M, N]."""
    size = y_MN.numel()
    _add_spans[(triton.cdiv(size, 256),)](
        parts,
        bias_N,
        y_MN,
        size,
        y_MN.shape[1],
        SPANS=len(parts),
        HAS_BIAS=bias_N is not None,
        BLOCK=256,
        num_warps=2,
    )


def cumulate(values_MN: Tensor) -> Tensor:
    """Return the sums of each row's values up to and with each of them, [M, N], in float32.

    A product with a triangle of ones sums within blocks, another one over the blocks. torch's cumulative sum
    has no fixed order on a card.
    """
    rows, columns = values_MN.shape
    blocks = triton.cdiv(columns, WIDTH)
    padded = torch.nn.functional.pad(values_MN.float(), (0, blocks * WIDTH - columns))
    inside = linear(padded.view(-1, WIDTH), _triangle(WIDTH, 0, values_MN.device)).view(rows, blocks, WIDTH)
    before = linear(inside[..., -1].contiguous(), _triangle(blocks, -1, values_MN.device))
    return (inside + before.unsqueeze(-1)).flatten(1)[:, :columns]


def _triangle(size: int, diagonal: int, device: torch.device) -> Tensor:
    """Return a matrix [size, size] of ones up to a diagonal and zeros above it."""
    return torch.ones(size, size, device=device).tril(diagonal)
