"""Mixtures of experts in torch: one grouped matrix product per projection, forward and backward.

N tokens · C hidden size · I intermediate size · E experts · K experts of each token · M = N x K choices, one
for each token and expert, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# functions that are applied to the factors of the products: one to activations, one to weights
Rounding = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
EXACT: Rounding = (lambda x: x, lambda weight: weight)


def sort_choices(chosen_NK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the order [M] that sorts the choices by expert, and the end of each expert's choices [E]."""
    sorted_M, order_M = chosen_NK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_M, torch.arange(experts, device=sorted_M.device), right=True)
    return order_M, ends_E


class Mixed(torch.autograd.Function):
    """The weighted sums of the outputs of experts.

    The weight of an expert's output is multiplied into its intermediate values, as they are fewer than its
    outputs.
    """

    @staticmethod
    def forward(ctx, x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E, rounding):
        """Return the weighted sums of the experts' outputs, [N, C].

        `order_M` sorts the choices by expert; the choices of expert e end at `ends_E[e]`.
        """
        tile, block = rounding
        ctx.rounding = rounding
        ctx.top_k = weights_NK.shape[1]
        gate_up_EIC = block(gate_up_EIC)
        down_ECI = block(down_ECI)
        x_MC = x_NC[order_M // ctx.top_k]
        both_MI = _grouped_product(tile(x_MC), gate_up_EIC.mT, ends_E)
        gate_MI, up_MI = both_MI.chunk(2, -1)
        weight_M1 = weights_NK.flatten()[order_M].unsqueeze(1)
        inner_MI = F.silu(gate_MI).mul_(up_MI)
        y_MC = _grouped_product(tile(inner_MI * weight_M1), down_ECI.mT, ends_E)
        ctx.save_for_backward(x_NC, both_MI, inner_MI, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E)
        return _sum_choices(y_MC, order_M, ctx.top_k)

    @staticmethod
    def backward(ctx, grad_NC):
        """Return the gradients by x [N, C], gate_up [E, 2 I, C], down [E, C, I] and weights [N, K]."""
        x_NC, both_MI, inner_MI, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E = ctx.saved_tensors
        tile, _ = ctx.rounding
        tokens_M = order_M // ctx.top_k
        x_MC = x_NC[tokens_M]
        grad_MC = grad_NC[tokens_M]
        weight_M1 = weights_NK.flatten()[order_M].unsqueeze(1)
        by_inner_MI = _grouped_product(tile(grad_MC), down_ECI, ends_E)
        weighted_MI = tile((inner_MI * weight_M1).T).T
        by_down_ECI = _grouped_product(tile(grad_MC.T), weighted_MI, ends_E)
        by_weight_M = torch.linalg.vecdot(by_inner_MI, inner_MI)
        by_inner_MI.mul_(weight_M1)
        by_both_MI = _swiglu_backward(by_inner_MI, both_MI)
        by_gate_up_EIC = _grouped_product(tile(by_both_MI.T), tile(x_MC.T).T, ends_E)
        by_x_MC = _grouped_product(tile(by_both_MI), gate_up_EIC, ends_E)
        by_x_NC = _sum_choices(by_x_MC, order_M, ctx.top_k)
        by_weights_M = torch.empty_like(by_weight_M).scatter_(0, order_M, by_weight_M)
        by_weights_NK = by_weights_M.view(-1, ctx.top_k)
        return by_x_NC, by_gate_up_EIC, by_down_ECI, by_weights_NK, None, None, None


def _swiglu_backward(grad_MI: Tensor, both_MI: Tensor) -> Tensor:
    """Return SwiGLU's gradient with respect to gate and up, side by side [M, 2 I]; overwrites `grad_MI`."""
    gate_MI, up_MI = both_MI.chunk(2, -1)
    by_both_MI = torch.empty_like(both_MI)
    by_gate_MI, by_up_MI = by_both_MI.chunk(2, -1)
    torch.mul(grad_MI, F.silu(gate_MI), out=by_up_MI)
    torch.ops.aten.silu_backward.grad_input(grad_MI.mul_(up_MI), gate_MI, grad_input=by_gate_MI)
    return by_both_MI


def _sum_choices(y_MC: Tensor, order_M: Tensor, top_k: int) -> Tensor:
    """Bring rows that are sorted by expert back to the order of their tokens, and sum them per token, [N, C].

    `order_M` is the index that sorted the rows.
    """
    places_M = torch.arange(len(order_M), device=order_M.device)
    back_M = torch.empty_like(order_M).scatter_(0, order_M, places_M)
    return y_MC[back_M].view(-1, top_k, y_MC.shape[-1]).sum(1)


def _grouped_product(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """Return one matrix product for each expert; the rows of expert e end at `ends_E[e]`.

    If `b` is [E, I, C], the rows of `a` [M, I] are multiplied with their expert's matrix, which gives [M, C].
    If `b` is [M, C], each expert's columns of `a` [I, M] are multiplied with its rows of `b`, which gives [E,
    I, C]. torch's grouped product takes only rows of a multiple of 16 bytes and types of at most 32 bits;
    otherwise one product per expert is computed.
    """
    if a.dtype != torch.float64 and _is_aligned(a) and _is_aligned(b):
        return F.grouped_mm(a, b, offs=ends_E)
    groups = list(pairwise([0, *ends_E.tolist()]))
    if b.ndim == 3:
        return torch.cat([a[begin:end] @ b[e] for e, (begin, end) in enumerate(groups)])
    return torch.stack([a[:, begin:end] @ b[begin:end] for begin, end in groups])


def _is_aligned(tensor: Tensor) -> bool:
    """Return True if the rows of a matrix [..., I, C] are a multiple of 16 bytes apart in memory."""
    return max(tensor.stride()[-2:]) * tensor.element_size() % 16 == 0
