"""Feed-forward layers, dense and with experts.

A mixture of experts sorts its tokens by expert and computes one grouped matrix product per projection,
forward and backward. N tokens · C hidden size · I intermediate size · E experts · G groups of experts · K
experts of each token · M = N x K choices, one for each token and expert.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .config import Experts, ModelConfig
from .context import Context, RouterTrace
from .linear import Linear
from .ops import CPUOps, PlainOps

Rounding = tuple[
    Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]
]  # functions for activations, for weights
EXACT: Rounding = (lambda x: x, lambda weight: weight)
SEED_BITS = 2**63 - 1  # bits of a hash that make a seed: all but the sign


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6).

    Gate and up are computed by one matrix product.
    """

    ops: PlainOps = CPUOps()

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_NC: Tensor, context: Context | None = None) -> Tensor:
        """Return the output of the layer, [N, C]; `context` is not used."""
        return self.down(self.ops.swiglu(self.gate_up(x_NC)))


class GELU(nn.Module):
    """Falcon's feed-forward without a gate: down(gelu(up(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_NC: Tensor, context: Context | None = None) -> Tensor:
        """Return the output of the layer, [N, C]; `context` is not used."""
        return self.down(F.gelu(self.up(x_NC)))


@torch.no_grad()
def balance_experts(mixtures: list[MixtureOfExperts], loads: list[Tensor], rate: float) -> None:
    """Lower the bias of experts above the mean load by `rate`, and raise it below the mean; in place.

    `loads` holds for each layer's mixture the number of tokens of each expert, [E] (arXiv 2412.19437, section
    2.1.2).
    """
    for mixture, load_E in zip(mixtures, loads, strict=False):
        if mixture.experts.balanced:
            mixture.correction += rate * (load_E.float().mean() - load_E).sign()


class MixtureOfExperts(nn.Module):
    """Shared and routed experts (DeepSeekMoE, arXiv 2401.06066; V3, arXiv 2412.19437, eq. 12-16).

    No token is dropped. `correction` is the bias with which DeepSeek-V3 balances the load without a loss: it
    changes after each update (`balance_experts`) and is added to the scores for the choice of experts, never
    to the weights of their outputs. `rounding` holds two functions that are applied to the factors of the
    experts' matrix products in training: one to activations, one to weights (fp8.py).
    """

    rounding: Rounding = EXACT

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts = config.experts
        hidden = config.hidden_size
        inner = experts.intermediate_size
        self.experts = experts
        self.router = nn.Linear(hidden, experts.count, bias=False)
        if experts.balanced:
            self.correction = nn.Parameter(torch.zeros(experts.count), requires_grad=False)
        self.experts_gate_up = nn.Parameter(torch.zeros(experts.count, 2 * inner, hidden))
        self.experts_down = nn.Parameter(torch.zeros(experts.count, hidden, inner))
        self.shared = SwiGLU(hidden, experts.shared_size) if experts.shared_size else None

    def forward(self, x_NC: Tensor, context: Context) -> Tensor:
        """Return the output of the layer, [N, C]; the choices of experts are recorded in `context.routes`."""
        scores_NE, chosen_NK = self.route(x_NC, context.routes)
        weights_NK = scores_NE.gather(1, chosen_NK)
        if self.experts.normalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        weights_NK = (weights_NK * self.experts.scale).to(x_NC.dtype)
        mixed_NC = mix_experts(
            x_NC,
            self.experts_gate_up,
            self.experts_down,
            chosen_NK,
            weights_NK,
            self.rounding if torch.is_grad_enabled() else EXACT,
        )
        return mixed_NC if self.shared is None else mixed_NC + self.shared(x_NC)

    def route(self, x_NC: Tensor, routes: RouterTrace | None) -> tuple[Tensor, Tensor]:
        """Return the score of every expert [N, E], in float32 or better, and the chosen experts [N, K].

        If `routes` has given choices, these are returned in place of new ones. The choices are recorded in
        `routes`.
        """
        precision = torch.promote_types(x_NC.dtype, torch.float32)
        logits_NE = F.linear(x_NC.to(precision), self.router.weight.to(precision))
        scores_NE = logits_NE.sigmoid() if self.experts.sigmoid else logits_NE.softmax(-1)
        with torch.no_grad():
            if routes is not None and routes.given is not None:
                chosen_NK = routes.given[:, len(routes.chosen)]
            else:
                chosen_NK = self._choose(scores_NE)
                if self.experts.capacity and self.training and x_NC.requires_grad:
                    chosen_NK = recycle(scores_NE, chosen_NK, self.experts)
        if routes is not None:
            routes.note(scores_NE, chosen_NK)
        return scores_NE, chosen_NK

    def _choose(self, scores_NE: Tensor) -> Tensor:
        """Return the indices of the experts with the best scores, [N, K].

        If the choice is limited to groups, only the experts of each token's best groups are considered.
        """
        experts = self.experts
        if experts.balanced:
            scores_NE = scores_NE + self.correction
        if experts.groups > 1:
            scores_NE = self._limit_to_groups(scores_NE)
        return scores_NE.topk(experts.top_k).indices

    def _limit_to_groups(self, scores_NE: Tensor) -> Tensor:
        """Return the scores [N, E] with -inf for experts outside each token's best groups.

        The score of a group is that of its best expert (DeepSeek-V2), or the sum of its two best
        (DeepSeek-V3).
        """
        experts = self.experts
        scores_NGE = scores_NE.view(len(scores_NE), experts.groups, -1)
        best_NG = scores_NGE.topk(2, -1).values.sum(-1) if experts.balanced else scores_NGE.amax(-1)
        allowed_NG = torch.zeros_like(best_NG, dtype=torch.bool)
        allowed_NG.scatter_(1, best_NG.topk(experts.top_groups).indices, True)
        return scores_NGE.masked_fill(~allowed_NG.unsqueeze(2), float("-inf")).flatten(1)


def recycle(scores_NE: Tensor, chosen_NK: Tensor, experts: Experts) -> Tensor:
    """Move tokens beyond an expert's capacity to experts with room; return the changed `chosen_NK`, [N, K].

    This is Hunyuan-Large's recycle routing (arXiv 2411.02265, section 2.2.3): the tokens to move are drawn at
    random. The random seed is computed from the scores, so that a resumed run draws the same tokens.
    """
    capacity = -(-int(len(chosen_NK) * experts.capacity) // experts.count)
    bits = scores_NE.sum().double().view(torch.int64)
    random = torch.Generator().manual_seed(int(bits) & SEED_BITS)
    for column_N in chosen_NK.T:  # top-1 in the paper; further choices are recycled one by one
        _recycle_column(column_N, capacity, experts.count, random)
    return chosen_NK


def _recycle_column(column_N: Tensor, capacity: int, count: int, random: torch.Generator) -> None:
    """Apply `recycle` in place to one choice of each token, [N], such as the tokens' first experts.

    `capacity` is the highest number of tokens per expert, `count` the number of experts.
    """
    device = column_N.device
    drawn_N = torch.randperm(len(column_N), generator=random).to(device)
    order_N = drawn_N[column_N[drawn_N].argsort(stable=True)]
    load_E = torch.bincount(column_N, minlength=count)
    begin_E = load_E.cumsum(0) - load_E
    rank_N = torch.arange(len(column_N), device=device) - begin_E[column_N[order_N]]
    over_M = order_N[rank_N >= capacity]
    room_E = (capacity - load_E).clamp(min=0)
    free_M = torch.arange(count, device=device).repeat_interleave(room_E)
    over_M = over_M[torch.randperm(len(over_M), generator=random).to(device)]
    over_M = over_M[: len(free_M)]
    free_M = free_M[torch.randperm(len(free_M), generator=random).to(device)]
    column_N[over_M] = free_M[: len(over_M)]


def mix_experts(
    x_NC: Tensor,
    gate_up_EIC: Tensor,
    down_ECI: Tensor,
    chosen_NK: Tensor,
    weights_NK: Tensor,
    rounding: Rounding = EXACT,
) -> Tensor:
    """Return the sum over each token's experts of weight x SwiGLU(x), [N, C].

    `chosen_NK` are the experts of each token and `weights_NK` the weights of their outputs.
    """
    order_M = chosen_NK.flatten().argsort(stable=True)
    ends_E = torch.bincount(chosen_NK.flatten(), minlength=len(down_ECI)).cumsum(0)
    each = len(order_M) // len(down_ECI)
    if rounding is EXACT and kernels.serves("mixture", each, x_NC, gate_up_EIC, down_ECI, weights_NK):
        return kernels.Mixture.apply(x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E)
    return _Mixed.apply(x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E.to(torch.int32), rounding)


class _Mixed(torch.autograd.Function):
    """`mix_experts` as an autograd function: one grouped matrix product per projection, forward and backward.

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
        ctx.save_for_backward(x_MC, both_MI, inner_MI, gate_up_EIC, down_ECI, weight_M1, order_M, ends_E)
        return _sum_choices(y_MC, order_M, ctx.top_k)

    @staticmethod
    def backward(ctx, grad_NC):
        """Return the gradients by x [N, C], gate_up [E, 2 I, C], down [E, C, I] and weights [N, K]."""
        x_MC, both_MI, inner_MI, gate_up_EIC, down_ECI, weight_M1, order_M, ends_E = ctx.saved_tensors
        tile, _ = ctx.rounding
        grad_MC = grad_NC[order_M // ctx.top_k]
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
