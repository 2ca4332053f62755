"""The card's own rates, and the kernels: products, attention, draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.model.ops.table import BLOCK, Pool, Rows

from .card import Card
from .models import config, weight_sizes
from .report import note, promise, spare

ROWS = (1, 2, 17, 64, 256, 2048)
SHAPES = ("0.5B", "1.5B", "7B")


def floor_part(card: Card, quick: bool) -> None:
    """Measure the card's copy rate and its rate of products in 16 bits: the floors of the other parts."""
    note("floor", **card.describe())
    note("floor", copy_TB_s=copy_rate(card) / 1e12, product_TFLOP_s=product_rate(card) / 1e12)


@cache
def copy_rate(card: Card) -> float:
    """Return the bytes a second that the card copies, each read and written."""
    x = torch.randn(card.size(1 << 28, 1 << 10), device=card.device)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / card.seconds(lambda: y.copy_(x))


@cache
def product_rate(card: Card) -> float:
    """Return the operations a second of a large product."""
    width = card.size(8192, 64)
    a = torch.randn(width, width, device=card.device, dtype=card.dtype)
    return 2 * width**3 / card.seconds(lambda: a @ a)


def _without_split(x: Tensor, w: Tensor) -> Tensor:
    """Return x @ w.T by cuBLASLt, told not to split the sum [M, N]."""
    matmul = torch.backends.cuda.matmul
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")  # the switch needs it
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    try:
        return F.linear(x, w)
    finally:
        matmul.allow_bf16_reduced_precision_reduction = (True, True)
        torch.backends.cuda.preferred_blas_library(before)


def products_part(card: Card, quick: bool) -> None:
    """Compare the bits of the same rows alone and in company, by three ways, and of several tiles."""
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "triton": card.kernels.linear,
        "cublas": F.linear,
        "cublaslt_without_split": card.size(_without_split, F.linear),
    }
    exact: dict[str, list[bool]] = {way: [] for way in ways}
    for shape in SHAPES[:1] if quick else SHAPES:
        for name, columns, inputs in weight_sizes(config(card, shape)):
            if not spare("products", f"{shape} {name}"):
                continue
            w = torch.randn(columns, inputs, device=card.device, dtype=card.dtype) * inputs**-0.5
            x = torch.randn(ROWS[-1], inputs, device=card.device, dtype=card.dtype)
            for way, call in ways.items():
                whole = call(x, w)
                same = [rows for rows in ROWS if torch.equal(call(x[:rows], w), whole[:rows])]
                exact[way].append(len(same) == len(ROWS))
                times = {
                    f"us{m}": round(card.microseconds(lambda: call(x[:m], w), 4), 1)  # noqa: B023
                    for m in (1, 64, 2048)
                }
                note("products", shape=shape, weight=name, way=way, same=same, **times)
            _tiles(card, f"{shape} {name}", x[:256], w)
    for way, each in exact.items():
        note("products", way=way, exact=f"{sum(each)} of {len(each)} weights")
    promise("products", "a row has the same bits in any company", all(exact["triton"]))


def _tiles(card: Card, name: str, x: Tensor, w: Tensor) -> None:
    """Compare the bits of several tiles, and of spans side by side, for one weight."""
    tiles = [(16, 16, 4, 4), (32, 64, 4, 4), (64, 128, 4, 4), (128, 128, 8, 3), (128, 256, 8, 3)]
    linear = card.kernels.linear
    whole = linear(x, w)
    same = [
        torch.equal(linear(x, w, tile=card.kernels.tile(*tile), beside=beside), whole)
        for tile in tiles
        for beside in (False, True)
    ]
    promise("products", f"{name}: tiles and spans do not change the bits", all(same))


def _blocks(card: Card, rows: int, length: int, kv_heads: int, width: int) -> tuple[Pool, Tensor]:
    """Return keys and values, and the table of `rows` rows of `length` tokens in shuffled blocks."""
    each = -(-length // BLOCK)
    keys = torch.randn(rows * each * BLOCK, kv_heads, width, device=card.device, dtype=card.dtype)
    table = BLOCK * torch.randperm(rows * each, device=card.device).int().view(rows, each)
    return (keys, torch.randn_like(keys)), table


def attention_part(card: Card, quick: bool) -> None:
    """Check attention against float64 and decoding against whole passes; time both."""
    for shape in SHAPES[:1] if quick else SHAPES:
        for window in (0, 100):
            if spare("attention", f"{shape}, window {window}"):
                _attention_bits(card, shape, window, card.size(200 if quick else 700, 70))
        sizes = config(card, shape)
        length = card.size(1024, 70)
        for rows in card.size((1, 64, 256), (1, 2)):
            if not spare("attention", f"{shape}, {rows} rows"):
                continue
            pool, table = _blocks(card, rows, length, sizes.kv_heads, sizes.head_dim)
            q = torch.randn(rows, sizes.heads, sizes.head_dim, device=card.device, dtype=card.dtype)
            lengths = torch.full((rows,), length, device=card.device, dtype=torch.int32)
            attend = card.kernels.attend_one
            us = card.microseconds(lambda: attend(q, pool, table, lengths, 0.1), 5)  # noqa: B023
            note("attention", shape=shape, rows=rows, us=round(us, 1), TB_s=4 * pool[0].numel() / us / 1e6)


def _attention_bits(card: Card, shape: str, window: int, length: int) -> None:
    """Compare four rows in one pass, by several tiles, with the same tokens one by one."""
    sizes = config(card, shape)
    count = 4
    scale = sizes.head_dim**-0.5
    device = card.device
    pool, table = _blocks(card, count, length, sizes.kv_heads, sizes.head_dim)
    q = 2 * torch.randn(count * length, sizes.heads, sizes.head_dim, device=device, dtype=card.dtype)
    starts = torch.arange(0, count * length + 1, length, device=device, dtype=torch.int32)
    lengths = torch.full((count,), length, device=device, dtype=torch.int32)
    rows = Rows(table, starts, lengths, length)
    ones = torch.empty_like(q)
    for place in range(length):
        at = torch.arange(count, device=device) * length + place
        seen = torch.full((count,), place + 1, device=device, dtype=torch.int32)
        ones[at] = card.kernels.attend_one(q[at], pool, table, seen, scale, window)
    differ = {}
    for tile in (16, 32, 64, 128):
        differ[tile] = int((card.kernels.attend(q, pool, rows, scale, window, tile)[0] != ones).sum())
    note("attention", shape=shape, window=window, differ=differ, of=ones.numel())
    same = not any(differ.values())
    promise("attention", f"{shape}, window {window}: decoding has the bits of a whole pass", same)
    if not window:
        error = _attention_error(q.view(count, length, *q.shape[1:]), pool, table, scale, ones)
        note("attention", shape=shape, error=error)
        promise("attention", f"{shape}: within 2e-2 of float64", error < 2e-2)


def _attention_error(q: Tensor, pool: Pool, table: Tensor, scale: float, found: Tensor) -> float:
    """Return the relative error of attention [N, H, D] against float64; q is [rows, length, H, D]."""
    length = q.shape[1]
    places = (table.long()[:, :, None] + torch.arange(BLOCK, device=q.device)).flatten(1)[:, :length]
    k, v = (x[places].transpose(1, 2).double() for x in pool)
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2).double(), k, v, is_causal=True, scale=scale, enable_gqa=True
    )
    right = mixed.transpose(1, 2).flatten(0, 1)
    return float((found.double() - right).norm() / right.norm())


def draw_part(card: Card, quick: bool) -> None:
    """Check and time the sampling of tokens from a large vocabulary."""
    for rows in card.size((1, 64, 256), (1, 4)):
        logits = 3 * torch.randn(rows, card.size(151_936, 512), device=card.device)
        uniform = torch.rand(rows, device=card.device)
        tokens, logprobs = card.kernels.draw(logits, uniform, 0.7)
        logp = (logits.double() / 0.7).log_softmax(-1)
        threshold = uniform.double()[:, None]
        wanted = torch.searchsorted(logp.exp().cumsum(-1), threshold, right=True)[:, 0]
        error = float((logprobs - logp.gather(1, tokens[:, None])[:, 0]).abs().max())
        us = card.microseconds(lambda: card.kernels.draw(logits, uniform, 0.7), 5)  # noqa: B023
        same = float((tokens == wanted).double().mean())
        note("draw", rows=rows, same_tokens=same, error=error, us=round(us, 1))
        bits = torch.equal(card.kernels.logprob(logits, tokens, 0.7), logprobs)
        promise("draw", f"{rows} rows: the learner's log-probability has the sampler's bits", bits)
        promise("draw", f"{rows} rows: tokens are those of float64", same > 0.99)
