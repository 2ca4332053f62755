"""Products of a mixture of experts, each token with its own experts' weights.

The choices of all tokens are sorted by expert, and each expert's choices are cut into tiles of rows. How many
choices an expert has is known to the card alone: the grid has as many tiles as there can be, each program
finds its tile, and those beyond the last have nothing to do. Every element is a sum over the inputs in blocks
of `BLOCK_K`, from the first to the last, and a token's outputs are added in the order of its choices, so
neither the other tokens nor the tiles change the bits. M = N x K choices, one for each token and expert · O
outputs · C inputs · E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .products import BLOCK_K, Tile, fit

BLOCK = 1024  # values of a token that one program sums over its experts


@triton.jit
def _place(ends_ptr, tile, experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the expert of a tile, and the tile's first choice and the end of the expert's choices.

    The expert of a tile beyond the last is `EXPERTS`.
    """
    spot = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + spot, mask=spot < experts, other=0)
    begins = tl.load(ends_ptr + spot - 1, mask=(spot > 0) & (spot < experts), other=0)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    rising = tl.cumsum(tiles, 0)
    expert = tl.sum((rising <= tile).to(tl.int32), 0)
    mine = spot == expert
    first = tl.sum(tl.where(mine, begins + (tile - rising + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, ends, 0), 0)


@triton.jit
def _grouped(
    x_ptr, w_ptr, ends_ptr, order_ptr, y_ptr, experts, outputs, inputs,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TOP_K: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    pid = tl.program_id(0)
    expert, first, end = _place(ends_ptr, pid // tiles_n, experts, EXPERTS, BLOCK_M)
    if expert >= EXPERTS:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_mask = rows[:, None] < end
    w_mask = columns[:, None] < outputs
    choices = tl.load(order_ptr + rows, mask=rows < end, other=0)
    sources = rows.to(tl.int64) if BACK else choices // TOP_K
    targets = choices if BACK else rows.to(tl.int64)
    x_tile = x_ptr + sources[:, None] * inputs + inner[None, :]
    w_tile = w_ptr + (expert.to(tl.int64) * outputs + columns[:, None]) * inputs + inner[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, inputs, BLOCK_K):
        ahead = inner[None, :] < inputs - k
        x = tl.load(x_tile + k, mask=x_mask & ahead, other=0.0)
        w = tl.load(w_tile + k, mask=w_mask & ahead, other=0.0)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    y = y_ptr + targets[:, None] * outputs + columns[None, :]
    tl.store(y, sums.to(y_ptr.dtype.element_ty), mask=x_mask & (columns[None, :] < outputs))


@triton.jit
def _sum_choices(y_ptr, weights_ptr, out_ptr, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(TOP_K):
        place = token * TOP_K + choice
        weight = tl.load(weights_ptr + place).to(tl.float32)
        y = tl.load(y_ptr + place * width + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.fma(y, weight, total)
    tl.store(out_ptr + token * width + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def most_tiles(choices: int, experts: int, rows: int) -> int:
    """Return how many tiles of so many rows the choices can need, however they fall on the experts."""
    used = min(choices, experts)
    return (choices + used * (rows - 1)) // rows


def choose_tile(choices: int, experts: int) -> Tile:
    """Return the tile of a grouped product: as many rows as an expert has choices on average, roughly.

    It was not timed on a card.
    """
    each = choices // experts
    if each <= 16:
        return Tile(16, 64, 4, 4)
    if each <= 64:
        return Tile(32, 64, 4, 4)
    return Tile(64, 128, 4, 3) if each <= 256 else Tile(128, 128, 8, 3)


def _grouped_product(
    x: Tensor, weight_EOC: Tensor, sorting: tuple[Tensor, Tensor], top_k: int, back: bool, tile: Tile | None
) -> Tensor:
    """Return the products of all choices with their experts' weights, [M, O].

    `sorting` is the order [M] that sorts the choices by expert, and the ends [E] of each expert's choices.
    Unless `back`, x is [N, C] and the results are sorted by expert; with it x [M, C] is, and the results are
    in the order of the tokens.
    """
    order_M, ends_E = sorting
    experts, outputs, inputs = weight_EOC.shape
    y_MO = x.new_empty(len(order_M), outputs)
    if not len(order_M):
        return y_MO
    tile = fit(tile or choose_tile(len(order_M), experts), x)
    programs = most_tiles(len(order_M), experts, tile.rows) * triton.cdiv(outputs, tile.columns)
    _grouped[(programs,)](
        x,
        weight_EOC,
        ends_E,
        order_M,
        y_MO,
        experts,
        outputs,
        inputs,
        EXPERTS=triton.next_power_of_2(experts),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=BLOCK_K,
        TOP_K=top_k,
        BACK=back,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y_MO


def spread(
    x_NC: Tensor, weight_EOC: Tensor, sorting: tuple[Tensor, Tensor], top_k: int, tile: Tile | None = None
) -> Tensor:
    """Return the products of each token with its experts' weights, sorted by expert, [M, O], in x's dtype.

    `tile` follows the sizes unless it is given; the result does not depend on it.
    """
    return _grouped_product(x_NC, weight_EOC, sorting, top_k, False, tile)


def gather(
    x_MC: Tensor,
    weight_EOC: Tensor,
    sorting: tuple[Tensor, Tensor],
    weights_NK: Tensor,
    tile: Tile | None = None,
) -> Tensor:
    """Return each token's weighted sum [N, O] of products of its sorted rows x with experts' weights."""
    tokens, top_k = weights_NK.shape
    y_MO = _grouped_product(x_MC, weight_EOC, sorting, top_k, True, tile)
    width = weight_EOC.shape[1]
    out_NO = x_MC.new_empty(tokens, width)
    if tokens:
        _sum_choices[(tokens, triton.cdiv(width, BLOCK))](
            y_MO, weights_NK, out_NO, width, TOP_K=top_k, BLOCK=BLOCK, num_warps=4
        )
    return out_NO
