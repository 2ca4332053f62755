"""Sampling of a token from logits, and the log-probability of a given one. B rows · V vocabulary · S blocks.

Both take the softmax from the same sums: the maximum and the sum of exponentials of each block of `BLOCK_V`
logits, merged over the blocks. So the log-probability that the learner computes has the sampler's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 2048  # logits of a block


@triton.jit
def _block_sums(logits_ptr, best_ptr, sums_ptr, vocabulary, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    where = block * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * vocabulary
    logits = tl.load(logits_ptr + where, mask=where < vocabulary, other=float("-inf")).to(tl.float32)
    logits = logits / temperature
    best = tl.max(logits, 0)
    safe = tl.where(best == float("-inf"), 0.0, best)
    place = row * tl.num_programs(1) + block
    tl.store(best_ptr + place, best)
    tl.store(sums_ptr + place, tl.sum(tl.exp(logits - safe), 0))


@triton.jit
def _totals(best_ptr, sums_ptr, row, blocks, BLOCKS: tl.constexpr):
    """Return the maximum, the sums of the blocks [S] relative to it, and their total."""
    at = tl.arange(0, BLOCKS)
    bests = tl.load(best_ptr + row * blocks + at, mask=at < blocks, other=float("-inf"))
    sums = tl.load(sums_ptr + row * blocks + at, mask=at < blocks, other=0.0)
    best = tl.max(bests, 0)
    sums = sums * tl.exp(bests - best)
    return best, sums, tl.sum(sums, 0)


@triton.jit
def _draw(
    logits_ptr, best_ptr, sums_ptr, uniform_ptr, tokens_ptr, logprobs_ptr, vocabulary, blocks, temperature,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    spot = tl.arange(0, BLOCKS)
    logits_ptr += row * vocabulary
    best, sums, total = _totals(best_ptr, sums_ptr, row, blocks, BLOCKS)
    if GREEDY:
        bests = tl.load(best_ptr + row * blocks + spot, mask=spot < blocks, other=float("-inf"))
        chosen = tl.argmax(bests, 0)
    else:
        threshold = tl.load(uniform_ptr + row) * total
        rising = tl.cumsum(sums, 0)
        last = tl.max(tl.where(sums > 0, spot, 0), 0)  # of the blocks that are not excluded
        chosen = tl.minimum(tl.sum((rising <= threshold).to(tl.int32), 0), last)
        begin = tl.sum(tl.where(spot == chosen - 1, rising, 0.0), 0)
    where = chosen * BLOCK + at
    logits = tl.load(logits_ptr + where, mask=where < vocabulary, other=float("-inf")).to(tl.float32)
    logits = logits / temperature
    if GREEDY:
        token = chosen * BLOCK + tl.argmax(logits, 0)
    else:
        inside = begin + tl.cumsum(tl.exp(logits - best), 0)
        below = tl.sum((inside <= threshold).to(tl.int32), 0)
        likely = chosen * BLOCK + tl.argmax(logits, 0)  # if rounding leaves the threshold beyond the block
        token = tl.where(below < BLOCK, chosen * BLOCK + below, likely)
        token = tl.where(token < vocabulary, token, likely)
    picked = tl.load(logits_ptr + token).to(tl.float32) / temperature
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, picked - best - tl.log(total))


@triton.jit
def _logprob(
    logits_ptr,
    best_ptr,
    sums_ptr,
    tokens_ptr,
    logprobs_ptr,
    vocabulary,
    blocks,
    temperature,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best, _, total = _totals(best_ptr, sums_ptr, row, blocks, BLOCKS)
    picked = tl.load(logits_ptr + row * vocabulary + tl.load(tokens_ptr + row)).to(tl.float32) / temperature
    tl.store(logprobs_ptr + row, picked - best - tl.log(total))


def _sums(logits_BV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the maximum and the sum of exponentials of each block of logits, both [B, S]."""
    rows, vocabulary = logits_BV.shape
    best = logits_BV.new_empty(rows, triton.cdiv(vocabulary, BLOCK_V), dtype=torch.float32)
    sums = torch.empty_like(best)
    _block_sums[best.shape](logits_BV, best, sums, vocabulary, temperature, BLOCK=BLOCK_V, num_warps=4)
    return best, sums


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return for each row a token and its log-probability, both [B]; temperature 0 takes the likeliest."""
    rows, vocabulary = logits_BV.shape
    best, sums = _sums(logits_BV, temperature or 1.0)
    tokens_B = torch.empty(rows, dtype=torch.long, device=logits_BV.device)
    logprobs_B = torch.empty(rows, dtype=torch.float32, device=logits_BV.device)
    blocks = best.shape[1]
    _draw[(rows,)](
        logits_BV, best, sums, uniform_B, tokens_B, logprobs_B, vocabulary, blocks, temperature or 1.0,
        BLOCK=BLOCK_V, BLOCKS=triton.next_power_of_2(blocks), GREEDY=temperature == 0, num_warps=4,
    )  # fmt: skip
    return tokens_B, logprobs_B


def logprob(logits_BV: Tensor, tokens_B: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each row's token [B]."""
    rows, vocabulary = logits_BV.shape
    best, sums = _sums(logits_BV, temperature)
    logprobs_B = torch.empty(rows, dtype=torch.float32, device=logits_BV.device)
    blocks = best.shape[1]
    _logprob[(rows,)](
        logits_BV, best, sums, tokens_B, logprobs_B, vocabulary, blocks, temperature,
        BLOCKS=triton.next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
    return logprobs_B


@triton.jit
def _score_sums(logits_ptr, best_ptr, sums_ptr, weighted_ptr, vocabulary, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    where = block * BLOCK + tl.arange(0, BLOCK)
    inside = where < vocabulary
    logits = tl.load(logits_ptr + row * vocabulary + where, mask=inside, other=float("-inf")).to(tl.float32)
    logits = logits / temperature
    best = tl.max(logits, 0)
    safe = tl.where(best == float("-inf"), 0.0, best)
    likely = tl.exp(logits - safe)
    place = row * tl.num_programs(1) + block
    tl.store(best_ptr + place, best)
    tl.store(sums_ptr + place, tl.sum(likely, 0))
    tl.store(weighted_ptr + place, tl.sum(tl.where(likely > 0, likely * logits, 0.0), 0))


@triton.jit
def _score(
    logits_ptr, best_ptr, sums_ptr, weighted_ptr, tokens_ptr, logprobs_ptr, entropies_ptr, logsum_ptr,
    vocabulary, blocks, temperature, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    best, _, total = _totals(best_ptr, sums_ptr, row, blocks, BLOCKS)
    spot = tl.arange(0, BLOCKS)
    bests = tl.load(best_ptr + row * blocks + spot, mask=spot < blocks, other=float("-inf"))
    weighted = tl.load(weighted_ptr + row * blocks + spot, mask=spot < blocks, other=0.0)
    mean = tl.sum(weighted * tl.exp(bests - best), 0) / total
    picked = tl.load(logits_ptr + row * vocabulary + tl.load(tokens_ptr + row)).to(tl.float32) / temperature
    tl.store(logprobs_ptr + row, picked - best - tl.log(total))
    tl.store(entropies_ptr + row, best + tl.log(total) - mean)
    tl.store(logsum_ptr + row, best + tl.log(total))


def score(logits_RV: Tensor, targets_R: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the targets' log-probabilities, the entropies, and the logs of the exponentials' sums, [R]."""
    rows, vocabulary = logits_RV.shape
    best = logits_RV.new_empty(rows, triton.cdiv(vocabulary, BLOCK_V), dtype=torch.float32)
    sums = torch.empty_like(best)
    weighted = torch.empty_like(best)
    _score_sums[best.shape](
        logits_RV, best, sums, weighted, vocabulary, temperature, BLOCK=BLOCK_V, num_warps=4
    )
    logprobs_R, entropies_R, logsum_R = logits_RV.new_empty(3, rows, dtype=torch.float32)
    blocks = best.shape[1]
    _score[(rows,)](
        logits_RV, best, sums, weighted, targets_R, logprobs_R, entropies_R, logsum_R, vocabulary, blocks,
        temperature, BLOCKS=triton.next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
    return logprobs_R, entropies_R, logsum_R


@triton.jit
def _score_backward(
    logits_ptr, tokens_ptr, grad_ptr, logsum_ptr, by_ptr, vocabulary, temperature, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    where = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = where < vocabulary
    logits = tl.load(logits_ptr + row * vocabulary + where, mask=mask, other=0.0).to(tl.float32) / temperature
    grad = tl.load(grad_ptr + row).to(tl.float32)
    likely = tl.exp(logits - tl.load(logsum_ptr + row))
    by = tl.where(where == tl.load(tokens_ptr + row), 1.0 - likely, -likely) * grad / temperature
    tl.store(by_ptr + row * vocabulary + where, by.to(by_ptr.dtype.element_ty), mask=mask)


def score_backward(
    logits_RV: Tensor,
    targets_R: Tensor,
    grad_R: Tensor,
    logsum_R: Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient by the logits [R, V], in `dtype`; `grad_R` is that by the log-probabilities.

    The gradient of a sum is one number that stands for all rows, so `grad_R` is written out first.
    """
    rows, vocabulary = logits_RV.shape
    by_RV = torch.empty(rows, vocabulary, dtype=dtype, device=logits_RV.device)
    _score_backward[(rows, triton.cdiv(vocabulary, BLOCK_V))](
        logits_RV, targets_R, grad_R.contiguous(), logsum_R, by_RV, vocabulary, temperature,
        BLOCK=BLOCK_V, num_warps=4,
    )  # fmt: skip
    return by_RV
