"""Attention to keys and values in blocks.

A row is one sequence. Its keys are read in steps of `BLOCK` positions (or a fraction, if keys are wide),
counted from the row's first token, and a run of `SEGMENT` blocks is a segment. Each segment is summed by
itself, and the segments are merged in order. One kernel walks all segments of a few neighbouring queries
(prefill, learning); another computes the segments of single queries side by side, and a third merges them
(decoding). All three share the functions below, so a token's result has the same bits in each, whatever is
computed beside it. Latents (multi-head latent attention) are keys of one head whose first part is the value
as well: it is read once, and the rest is the tail. N new tokens · B rows · H heads · K key heads · G query
heads of a key head · D head size of values, and of keys without the tail.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.table import BLOCK, Pool, Rows
from .card import stages
from .products import FLOAT32_TILE

SEGMENT = 4  # blocks
HEADS = 4  # heads whose segments one program merges
MOST_ROWS = 64  # queries of one program, times query heads
WIDE = 16 << 10  # bytes of a program's queries beyond which it takes eight warps
PART_BYTES = 32 << 10  # of shared memory for the queries of a program, and for one step's keys or values
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _segment(
    q, q_tail, position, k_ptr, v_ptr, table_ptr, first, last, length, scale, window, token_stride,
    BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum one segment, the steps `first` to `last`: the maximum, the weights' sum, the mixed values."""
    place = tl.arange(0, STEP)
    d = tl.arange(0, BLOCK_D)[None, :]
    t = tl.arange(0, BLOCK_T)[None, :]
    ones = tl.full((STEP, 16), 1.0, q.dtype)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 16), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for step in range(first, last):
        base = tl.load(table_ptr + step * STEP // BLOCK).to(tl.int64) + step * STEP % BLOCK
        key = step * STEP + place
        at = (base + place)[:, None] * token_stride
        inside = (key < length)[:, None]
        k = tl.load(k_ptr + at + d, mask=inside & (d < D), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if TAIL > 0:
            k_tail = tl.load(k_ptr + at + D + t, mask=inside & (t < TAIL), other=0.0)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
            v = k
        else:
            v = tl.load(v_ptr + at + d, mask=inside & (d < D), other=0.0)
        scores = scores * scale
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
def _queries(
    q_ptr, token, head, real, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Load queries, and their tails: without one, the queries again."""
    d = tl.arange(0, BLOCK_D)[None, :]
    at = (token.to(tl.int64) * H + head)[:, None] * (D + TAIL)
    q = tl.load(q_ptr + at + d, mask=real[:, None] & (d < D), other=0.0)
    if TAIL > 0:
        t = tl.arange(0, BLOCK_T)[None, :]
        return q, tl.load(q_ptr + at + D + t, mask=real[:, None] & (t < TAIL), other=0.0)
    else:
        return q, q


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, starts_ptr, lengths_ptr, out_ptr, lse_ptr,
    scale, token_stride, head_stride, table_stride, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, SEGMENT: tl.constexpr,
    PART: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (G + PART - 1) // PART
    STEPS: tl.constexpr = SEGMENT * BLOCK // STEP
    QUERIES: tl.constexpr = BLOCK_M // PART
    kv = tl.program_id(1) // PARTS
    first = tl.program_id(2) * QUERIES
    begin = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - begin
    if first >= count:
        return
    length = tl.load(lengths_ptr + row)
    m = tl.arange(0, BLOCK_M)
    query = first + m // PART
    member = tl.program_id(1) % PARTS * PART + m % PART
    head = kv * G + member
    real = (m < QUERIES * PART) & (member < G) & (query < count)
    position = length - count + query
    q, q_tail = _queries(q_ptr, begin + query, head, real, H, D, BLOCK_D, TAIL, BLOCK_T)
    steps = tl.cdiv(tl.minimum(length - count + first + QUERIES, length), STEP)
    lowest = 0
    if window > 0:
        lowest = tl.maximum(length - count + first - window + 1, 0) // BLOCK // SEGMENT
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for segment in range(lowest, tl.cdiv(steps, STEPS)):
        more_best, more_total, more_mixed = _segment(
            q, q_tail, position, k_ptr + kv * head_stride, v_ptr + kv * head_stride,
            table_ptr + row * table_stride, segment * STEPS, tl.minimum(segment * STEPS + STEPS, steps),
            length, scale, window, token_stride, BLOCK_M, D, BLOCK_D, TAIL, BLOCK_T, BLOCK, STEP,
        )  # fmt: skip
        best, total, mixed = _merge(best, total, mixed, more_best, more_total, more_mixed)
    mixed = mixed / total[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    place = (begin + query).to(tl.int64) * H + head
    tl.store(
        out_ptr + place[:, None] * D + d, mixed.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < D)
    )
    tl.store(lse_ptr + place, (best + tl.log2(total)) / LOG2E, mask=real)


@triton.jit
def _attend_segments(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, best_ptr, total_ptr, mixed_ptr,
    scale, token_stride, head_stride, table_stride, window,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, SEGMENT: tl.constexpr,
    PART: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    segment = tl.program_id(2)
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (G + PART - 1) // PART
    STEPS: tl.constexpr = SEGMENT * BLOCK // STEP
    kv = tl.program_id(1) // PARTS
    length = tl.load(lengths_ptr + row)
    steps = tl.cdiv(length, STEP)
    if segment * STEPS >= steps:
        return
    if window > 0 and (segment + 1) * SEGMENT * BLOCK <= length - window:
        return
    m = tl.arange(0, BLOCK_M)
    member = tl.program_id(1) % PARTS * PART + m
    head = kv * G + member
    real = (m < PART) & (member < G)
    q, q_tail = _queries(q_ptr, row, head, real, H, D, BLOCK_D, TAIL, BLOCK_T)
    position = tl.zeros((BLOCK_M,), tl.int32) + length - 1
    best, total, mixed = _segment(
        q, q_tail, position, k_ptr + kv * head_stride, v_ptr + kv * head_stride,
        table_ptr + row * table_stride, segment * STEPS, tl.minimum(segment * STEPS + STEPS, steps),
        length, scale, window, token_stride, BLOCK_M, D, BLOCK_D, TAIL, BLOCK_T, BLOCK, STEP,
    )  # fmt: skip
    place = (row.to(tl.int64) * tl.num_programs(2) + segment) * H + head
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(best_ptr + place, best, mask=real)
    tl.store(total_ptr + place, total, mask=real)
    tl.store(mixed_ptr + place[:, None] * D + d, mixed, mask=real[:, None] & (d < D))


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


class Sizes(NamedTuple):
    """The constants of a launch: see `_segment` and `_attend`.

    `step` decides how sums round, so it follows the keys alone. `part` is the number of query heads, of those
    of a key head, that one program takes, and `most` the queries of a program, times query heads.
    """

    width: int
    tail: int
    step: int
    part: int
    most: int

    @classmethod
    def of(cls, q_NHD: Tensor, pool: Pool) -> Sizes:
        """Return the sizes for some queries and a pool."""
        keys, values = pool
        width = values.shape[-1]
        each = _padded(width) * q_NHD.element_size()
        most = max(16, min(MOST_ROWS, PART_BYTES // each))
        if q_NHD.element_size() > 2:
            most = max(16, min(most, FLOAT32_TILE // _padded(width)))
        group = q_NHD.shape[1] // keys.shape[1]
        step = max(16, min(BLOCK, PART_BYTES // each))
        return cls(width, keys.shape[-1] - width, step, min(group, most), most)

    def constants(self, q_NHD: Tensor, rows: int, pool: Pool) -> dict[str, int]:
        """Return the constants, warps and stages of a kernel that takes so many queries, times heads."""
        second = _padded(self.tail) if self.tail else _padded(self.width)
        each = self.step * (_padded(self.width) + second) * q_NHD.element_size()
        return {
            "H": q_NHD.shape[1],
            "K": pool[0].shape[1],
            "D": self.width,
            "BLOCK_D": _padded(self.width),
            "TAIL": self.tail,
            "BLOCK_T": _padded(self.tail),
            "BLOCK": BLOCK,
            "STEP": self.step,
            "SEGMENT": SEGMENT,
            "PART": self.part,
            "BLOCK_M": rows,
            "num_warps": 8 if rows * _padded(self.width) * q_NHD.element_size() > WIDE else 4,
            "num_stages": stages(3, each, q_NHD.device),
        }


def attend(
    q_NHD: Tensor, pool: Pool, rows: Rows, scale: float, window: int = 0, tile: int = MOST_ROWS
) -> tuple[Tensor, Tensor]:
    """Return the mixed values [N, H, D] and the logs of the sums of exponentials [N, H] of many queries.

    `tile` is the number of queries, times query heads, that one program computes, or fewer if keys are wide.
    """
    tokens, heads, _ = q_NHD.shape
    keys, values = pool
    sizes = Sizes.of(q_NHD, pool)
    tile = max(min(tile, sizes.most), triton.next_power_of_2(sizes.part))
    out = q_NHD.new_empty(tokens, heads, sizes.width)
    lse = q_NHD.new_empty(tokens, heads, dtype=torch.float32)
    parts = triton.cdiv(heads // keys.shape[1], sizes.part)
    grid = (len(rows.lengths), keys.shape[1] * parts, triton.cdiv(rows.longest, tile // sizes.part))
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
        **sizes.constants(q_NHD, tile, pool),
    )
    return out, lse


def attend_one(
    q_BHD: Tensor, pool: Pool, table: Tensor, lengths: Tensor, scale: float, window: int = 0
) -> Tensor:
    """Return the mixed values [B, H, D] of one query a row, its last token; see `Ops.attend_one`."""
    count, heads, _ = q_BHD.shape
    keys, values = pool
    sizes = Sizes.of(q_BHD, pool)
    segments = triton.cdiv(table.shape[1], SEGMENT)
    best = q_BHD.new_empty(count, segments, heads, dtype=torch.float32)
    total = torch.empty_like(best)
    mixed = q_BHD.new_empty(count, segments, heads, sizes.width, dtype=torch.float32)
    out = q_BHD.new_empty(count, heads, sizes.width)
    parts = triton.cdiv(heads // keys.shape[1], sizes.part)
    _attend_segments[(count, keys.shape[1] * parts, segments)](
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
        **sizes.constants(q_BHD, _padded(sizes.part), pool),
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
        D=sizes.width,
        BLOCK_D=_padded(sizes.width),
        BLOCK=BLOCK,
        SEGMENT=SEGMENT,
        HEADS=HEADS,
        num_warps=2,
    )
    return out


def _padded(size: int) -> int:
    """Return the size of a tile that holds so many values: a power of two, and 16 at least."""
    return max(16, triton.next_power_of_2(size))
