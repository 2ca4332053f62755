"""Attention to keys and values in blocks.

A row is one sequence. Its keys are read in blocks of `BLOCK` positions, counted from the row's first token,
and a run of `SEGMENT` blocks is a segment. Each segment is summed by itself, and the segments are merged in
order. One kernel walks all segments of a few neighbouring queries (prefill, learning); another computes the
segments of single queries side by side, and a third merges them (decoding). All three share the functions
below, so a token's result has the same bits in each, whatever is computed beside it. N new tokens · B rows ·
H heads · K key heads · D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.table import BLOCK, Pool, Rows
from .card import stages

SEGMENT = 4  # blocks
HEADS = 4  # heads whose segments one program merges
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _segment(
    q, position, k_ptr, v_ptr, table_ptr, first, last, length, scale, window, token_stride, d, inside_d,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum one segment, the blocks `first` to `last`: the maximum, the weights' sum, the mixed values."""
    place = tl.arange(0, BLOCK)
    ones = tl.full((BLOCK, 16), 1.0, q.dtype)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 16), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for block in range(first, last):
        base = tl.load(table_ptr + block).to(tl.int64)
        key = block * BLOCK + place
        at = (base + place)[:, None] * token_stride + d[None, :]
        inside = inside_d[None, :] & (key < length)[:, None]
        k = tl.load(k_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = key[None, :] <= position[:, None]
        if window > 0:
            seen &= key[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(scores - safe[:, None]).to(q.dtype)
        shrink = tl.exp2(best - safe)
        # the weights are summed by a product, whose order of summation does not depend on the tile
        total = tl.dot(weight, ones, total * shrink[:, None], input_precision="ieee")
        mixed = tl.dot(weight, v, mixed * shrink[:, None], input_precision="ieee")
        best = new_best
    column = tl.arange(0, 16)
    return best, tl.sum(tl.where(column[None, :] == 0, total, 0.0), 1), mixed


@triton.jit
def _merge(best, total, mixed, more_best, more_total, more_mixed):
    """Merge two sums; products and additions are fused explicitly, so that all kernels round alike."""
    new_best = tl.maximum(best, more_best)
    safe = tl.where(new_best == float("-inf"), 0.0, new_best)
    shrink = tl.exp2(best - safe)
    more_shrink = tl.exp2(more_best - safe)
    total = tl.fma(total, shrink, more_total * more_shrink)
    mixed = tl.fma(mixed, shrink[:, None], more_mixed * more_shrink[:, None])
    return new_best, total, mixed


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, starts_ptr, lengths_ptr, out_ptr, lse_ptr,
    scale, token_stride, head_stride, table_stride, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    kv = tl.program_id(1)
    G: tl.constexpr = H // K
    QUERIES: tl.constexpr = BLOCK_M // G
    first = tl.program_id(2) * QUERIES
    begin = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - begin
    if first >= count:
        return
    length = tl.load(lengths_ptr + row)
    m = tl.arange(0, BLOCK_M)
    query = first + m // G
    head = kv * G + m % G
    real = (m < QUERIES * G) & (query < count)
    position = length - count + query
    d = tl.arange(0, BLOCK_D)
    at = ((begin + query).to(tl.int64)[:, None] * H + head[:, None]) * D + d[None, :]
    q = tl.load(q_ptr + at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    blocks = tl.cdiv(tl.minimum(length - count + first + QUERIES, length), BLOCK)
    lowest = 0
    if window > 0:
        lowest = tl.maximum(length - count + first - window + 1, 0) // BLOCK // SEGMENT
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for segment in range(lowest, tl.cdiv(blocks, SEGMENT)):
        more_best, more_total, more_mixed = _segment(
            q, position, k_ptr + kv * head_stride, v_ptr + kv * head_stride, table_ptr + row * table_stride,
            segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, blocks), length, scale, window,
            token_stride, d, d < D, BLOCK_M, BLOCK_D, BLOCK,
        )  # fmt: skip
        best, total, mixed = _merge(best, total, mixed, more_best, more_total, more_mixed)
    mixed = mixed / total[:, None]
    tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])
    lse = (best + tl.log2(total)) / LOG2E
    tl.store(lse_ptr + (begin + query).to(tl.int64) * H + head, lse, mask=real)


@triton.jit
def _attend_segments(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, best_ptr, total_ptr, mixed_ptr,
    scale, token_stride, head_stride, table_stride, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    kv = tl.program_id(1)
    segment = tl.program_id(2)
    G: tl.constexpr = H // K
    length = tl.load(lengths_ptr + row)
    blocks = tl.cdiv(length, BLOCK)
    if segment * SEGMENT >= blocks:
        return
    if window > 0 and (segment + 1) * SEGMENT * BLOCK <= length - window:
        return
    m = tl.arange(0, BLOCK_M)
    head = kv * G + m
    real = m < G
    d = tl.arange(0, BLOCK_D)
    at = (row.to(tl.int64) * H + head[:, None]) * D + d[None, :]
    q = tl.load(q_ptr + at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    position = tl.zeros((BLOCK_M,), tl.int32) + length - 1
    best, total, mixed = _segment(
        q, position, k_ptr + kv * head_stride, v_ptr + kv * head_stride, table_ptr + row * table_stride,
        segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, blocks), length, scale, window,
        token_stride, d, d < D, BLOCK_M, BLOCK_D, BLOCK,
    )  # fmt: skip
    place = (row.to(tl.int64) * tl.num_programs(2) + segment) * H + head
    tl.store(best_ptr + place, best, mask=real)
    tl.store(total_ptr + place, total, mask=real)
    tl.store(mixed_ptr + place[:, None] * D + d[None, :], mixed, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _merge_segments(
    best_ptr, total_ptr, mixed_ptr, lengths_ptr, out_ptr, segments, window,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = head < H
    d = tl.arange(0, BLOCK_D)
    length = tl.load(lengths_ptr + row)
    lowest = 0
    if window > 0:
        lowest = tl.maximum(length - window, 0) // BLOCK // SEGMENT
    best = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixed = tl.zeros((HEADS, BLOCK_D), tl.float32)
    for segment in range(lowest, tl.cdiv(tl.cdiv(length, BLOCK), SEGMENT)):
        place = (row.to(tl.int64) * segments + segment) * H + head
        more_best = tl.load(best_ptr + place, mask=real, other=0.0)
        more_total = tl.load(total_ptr + place, mask=real, other=1.0)
        more_mixed = tl.load(
            mixed_ptr + place[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
        )
        best, total, mixed = _merge(best, total, mixed, more_best, more_total, more_mixed)
    mixed = mixed / total[:, None]
    at = (row.to(tl.int64) * H + head[:, None]) * D + d[None, :]
    tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


def attend(
    q_NHD: Tensor, pool: Pool, rows: Rows, scale: float, window: int = 0, tile: int = 64
) -> tuple[Tensor, Tensor]:
    """Return the mixed values [N, H, D] and the logs of the sums of exponentials [N, H] of many queries.

    `tile` is the number of queries, of all query heads of a key head, that one program computes.
    """
    heads, width = q_NHD.shape[1:]
    keys, values = pool
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    tile = max(tile, triton.next_power_of_2(group))
    out = torch.empty_like(q_NHD)
    lse = q_NHD.new_empty(q_NHD.shape[:2], dtype=torch.float32)
    grid = (len(rows.lengths), kv_heads, triton.cdiv(rows.longest, tile // group))
    _attend[grid](
        q_NHD,
        keys,
        values,
        rows.table,
        rows.starts,
        rows.lengths,
        out,
        lse,
        scale * LOG2E.value,
        keys.stride(0),
        keys.stride(1),
        rows.table.stride(0),
        window,
        H=heads,
        K=kv_heads,
        D=width,
        BLOCK_D=_padded(width),
        BLOCK=BLOCK,
        SEGMENT=SEGMENT,
        BLOCK_M=tile,
        num_warps=4,
        num_stages=stages(3, 2 * BLOCK * _padded(width) * q_NHD.element_size(), q_NHD.device),
    )
    return out, lse


def attend_one(
    q_BHD: Tensor, pool: Pool, table: Tensor, lengths: Tensor, scale: float, window: int = 0
) -> Tensor:
    """Return the mixed values [B, H, D] of one query a row, its last token; see `Ops.attend_one`."""
    count, heads, width = q_BHD.shape
    keys, values = pool
    kv_heads = keys.shape[1]
    segments = triton.cdiv(table.shape[1], SEGMENT)
    best = q_BHD.new_empty(count, segments, heads, dtype=torch.float32)
    total = torch.empty_like(best)
    mixed = q_BHD.new_empty(count, segments, heads, width, dtype=torch.float32)
    out = torch.empty_like(q_BHD)
    _attend_segments[(count, kv_heads, segments)](
        q_BHD,
        keys,
        values,
        table,
        lengths,
        best,
        total,
        mixed,
        scale * LOG2E.value,
        keys.stride(0),
        keys.stride(1),
        table.stride(0),
        window,
        H=heads,
        K=kv_heads,
        D=width,
        BLOCK_D=_padded(width),
        BLOCK=BLOCK,
        SEGMENT=SEGMENT,
        BLOCK_M=_padded(heads // kv_heads),
        num_warps=4,
        num_stages=stages(3, 2 * BLOCK * _padded(width) * q_BHD.element_size(), q_BHD.device),
    )
    _merge_segments[(count, triton.cdiv(heads, HEADS))](
        best,
        total,
        mixed,
        lengths,
        out,
        segments,
        window,
        H=heads,
        D=width,
        BLOCK_D=_padded(width),
        BLOCK=BLOCK,
        SEGMENT=SEGMENT,
        HEADS=HEADS,
        num_warps=2,
    )
    return out


def _padded(size: int) -> int:
    """Return the size of a tile that holds so many values: a power of two, and 16 at least."""
    return max(16, triton.next_power_of_2(size))
