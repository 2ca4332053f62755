"""Feed-forward layers. N tokens · C hidden · I intermediate · E experts · K chosen a token · M = N x K.

A mixture sorts its tokens by expert and makes one grouped product per projection, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .config import Experts, ModelConfig
from .linear import Linear

if TYPE_CHECKING:
    from .attention import Context


Rounding = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # of activations, of weights
EXACT: Rounding = (lambda x: x, lambda weight: weight)


def swiglu(both_NI: Tensor) -> Tensor:
    """silu(gate) x up, of the two halves of the last dimension."""
    if kernels.serves("swiglu", both_NI.numel(), both_NI):
        return kernels.SwiGLU.apply(both_NI)
    gate_NI, up_NI = both_NI.chunk(2, dim=-1)
    return F.silu(gate_NI) * up_NI


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6); gate and up are one product."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_NC: Tensor, context: Context | None = None) -> Tensor:
        return self.down(swiglu(self.gate_up(x_NC)))


class GELU(nn.Module):
    """down(gelu(up(x))), Falcon's."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_NC: Tensor, context: Context | None = None) -> Tensor:
        return self.down(F.gelu(self.up(x_NC)))


class Routes:
    """Which experts a forward pass chose, layer by layer; or, where `given`, was told to choose (router replay).

    `given` is [N, sparse layers, K]. `balance` weighs the sequence-wise balance loss, for which `sequences_N`
    numbers each token's sequence. A forward pass leaves the choice [N, K] of each layer, its tokens an expert,
    its routers' entropy, summed over tokens, and its balance loss.
    """

    def __init__(self, given: Tensor | None = None, balance: float = 0.0, sequences_N: Tensor | None = None):
        self.given, self.balance, self.sequences_N = given, balance, sequences_N
        self.chosen: list[Tensor] = []
        self.loads: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self.penalties: list[Tensor] = []

    def note(self, scores_NE: Tensor, chosen_NK: Tensor) -> None:
        """Called by each mixture in turn."""
        self.chosen.append(chosen_NK)
        self.loads.append(torch.bincount(chosen_NK.flatten(), minlength=scores_NE.shape[1]))
        share_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        self.entropies.append(torch.special.entr(share_NE.detach()).sum())
        if self.balance:
            self.penalties.append(self.balance * sequence_balance(share_NE, chosen_NK, self.sequences_N))


def sequence_balance(share_NE: Tensor, chosen_NK: Tensor, sequences_N: Tensor) -> Tensor:
    """DeepSeek-V3's sequence-wise balance (arXiv 2412.19437, eq. 17-20): sum of f_e P_e, summed over sequences;
    1 for one that meets its experts evenly."""
    count, top_k = share_NE.shape[1], chosen_NK.shape[1]
    sequences = int(sequences_N.max()) + 1
    lengths_S1 = torch.bincount(sequences_N, minlength=sequences).clamp(min=1).unsqueeze(1)
    met = torch.bincount(
        (sequences_N.unsqueeze(1) * count + chosen_NK).flatten(), minlength=sequences * count
    )
    frequency_SE = met.view(sequences, count).to(share_NE.dtype) * (count / top_k) / lengths_S1
    mean_SE = torch.zeros_like(frequency_SE).index_add(0, sequences_N, share_NE) / lengths_S1
    return (frequency_SE * mean_SE).sum()


@torch.no_grad()
def balance_experts(mixtures: list[MixtureOfExperts], loads: list[Tensor], rate: float) -> None:
    """Move each bias by `rate` against its expert's load (arXiv 2412.19437, section 2.1.2)."""
    for mixture, load_E in zip(mixtures, loads, strict=False):
        if mixture.experts.balanced:
            mixture.correction += rate * (load_E.float().mean() - load_E).sign()


class MixtureOfExperts(nn.Module):
    """Shared and routed experts (DeepSeekMoE, arXiv 2401.06066; V3, arXiv 2412.19437, eq. 12-16).

    No token is dropped. `correction` is the bias that balances without a loss: it moves against the load after
    each update (`balance_experts`), selects, and never weighs.
    """

    rounding: Rounding = EXACT

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts = self.experts = config.experts
        self.router = nn.Linear(config.hidden_size, experts.count, bias=False)
        if experts.balanced:
            self.correction = nn.Parameter(torch.zeros(experts.count), requires_grad=False)
        shape = (experts.count, 2 * experts.intermediate_size, config.hidden_size)
        self.experts_gate_up = nn.Parameter(torch.zeros(shape))
        self.experts_down = nn.Parameter(
            torch.zeros(experts.count, config.hidden_size, experts.intermediate_size)
        )
        self.shared = SwiGLU(config.hidden_size, experts.shared_size) if experts.shared_size else None

    def forward(self, x_NC: Tensor, context: Context) -> Tensor:
        scores_NE, chosen_NK = self.route(x_NC, context.routes)
        weights_NK = scores_NE.gather(1, chosen_NK)
        if self.experts.normalize:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        weights_NK = (weights_NK * self.experts.scale).to(x_NC.dtype)
        rounding = self.rounding if torch.is_grad_enabled() else EXACT
        mixed_NC = experts_mixed(
            x_NC, self.experts_gate_up, self.experts_down, chosen_NK, weights_NK, rounding
        )
        return mixed_NC if self.shared is None else mixed_NC + self.shared(x_NC)

    def route(self, x_NC: Tensor, routes: Routes | None) -> tuple[Tensor, Tensor]:
        """Every expert's score, in float32 or better, and each token's choice."""
        precision = torch.promote_types(x_NC.dtype, torch.float32)
        logits_NE = F.linear(x_NC.to(precision), self.router.weight.to(precision))
        scores_NE = logits_NE.sigmoid() if self.experts.sigmoid else logits_NE.softmax(-1)
        with torch.no_grad():
            replayed = routes is not None and routes.given is not None
            chosen_NK = routes.given[:, len(routes.chosen)] if replayed else self._choose(scores_NE)
            if not replayed and self.experts.capacity and self.training and x_NC.requires_grad:
                chosen_NK = recycle(scores_NE, chosen_NK, self.experts)
        if routes is not None:
            routes.note(scores_NE, chosen_NK)
        return scores_NE, chosen_NK

    def _choose(self, scores_NE: Tensor) -> Tensor:
        experts = self.experts
        if experts.balanced:
            scores_NE = scores_NE + self.correction
        if experts.groups > 1:
            grouped_NGE = scores_NE.view(len(scores_NE), experts.groups, -1)
            best_NG = grouped_NGE.topk(2, -1).values.sum(-1) if experts.balanced else grouped_NGE.amax(-1)
            kept_NG = torch.zeros_like(best_NG, dtype=torch.bool).scatter_(
                1, best_NG.topk(experts.top_groups).indices, True
            )
            scores_NE = grouped_NGE.masked_fill(~kept_NG.unsqueeze(2), float("-inf")).flatten(1)
        return scores_NE.topk(experts.top_k).indices


def recycle(scores_NE: Tensor, chosen_NK: Tensor, experts: Experts) -> Tensor:
    """Hunyuan-Large's recycle routing (arXiv 2411.02265, section 2.2.3): the tokens beyond an expert's capacity,
    drawn at random, go to experts with room. Randomness is a function of the scores, so a resumed run repeats it."""
    tokens = len(chosen_NK)
    room = -(-int(tokens * experts.capacity) // experts.count)
    random = torch.Generator().manual_seed(int(scores_NE.sum().double().view(torch.int64)) & (2**63 - 1))
    for column_N in chosen_NK.T:  # top-1 in the paper; more choices are recycled one by one
        drawn_N = torch.randperm(tokens, generator=random).to(column_N.device)
        order_N = drawn_N[column_N[drawn_N].argsort(stable=True)]
        load_E = torch.bincount(column_N, minlength=experts.count)
        begin_E = load_E.cumsum(0) - load_E
        rank_N = torch.arange(tokens, device=column_N.device) - begin_E[column_N[order_N]]
        over_M = order_N[rank_N >= room]
        free_M = torch.arange(experts.count, device=column_N.device).repeat_interleave(
            (room - load_E).clamp(min=0)
        )
        over_M = over_M[torch.randperm(len(over_M), generator=random).to(over_M.device)][: len(free_M)]
        column_N[over_M] = free_M[torch.randperm(len(free_M), generator=random).to(over_M.device)][
            : len(over_M)
        ]
    return chosen_NK


def experts_mixed(
    x_NC: Tensor,
    gate_up_EIC: Tensor,
    down_ECI: Tensor,
    chosen_NK: Tensor,
    weights_NK: Tensor,
    rounding: Rounding = EXACT,
) -> Tensor:
    """Sum over each token's experts of weight x SwiGLU(x)."""
    order_M = chosen_NK.flatten().argsort(stable=True)
    ends_E = torch.bincount(chosen_NK.flatten(), minlength=len(down_ECI)).cumsum(0)
    each = len(order_M) // len(down_ECI)
    if rounding is EXACT and kernels.serves("mixture", each, x_NC, gate_up_EIC, down_ECI, weights_NK):
        return kernels.Mixture.apply(x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E)
    return _Mixed.apply(x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E.to(torch.int32), rounding)


class _Mixed(torch.autograd.Function):
    """Rows sorted by expert meet their expert's matrix in one grouped product, and back the same way.

    The weight of an expert multiplies what is inside it, which is narrower than what comes out.
    """

    @staticmethod
    def forward(ctx, x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E, rounding):
        tile, block = ctx.rounding = rounding
        ctx.top_k = weights_NK.shape[1]
        gate_up_EIC, down_ECI = block(gate_up_EIC), block(down_ECI)
        x_MC = x_NC[order_M // ctx.top_k]
        both_MI = _grouped(tile(x_MC), gate_up_EIC.mT, ends_E)
        gate_MI, up_MI = both_MI.chunk(2, -1)
        weight_M1 = weights_NK.flatten()[order_M].unsqueeze(1)
        inner_MI = F.silu(gate_MI).mul_(up_MI)
        y_MC = _grouped(tile(inner_MI * weight_M1), down_ECI.mT, ends_E)
        ctx.save_for_backward(x_MC, both_MI, inner_MI, gate_up_EIC, down_ECI, weight_M1, order_M, ends_E)
        return _gathered(y_MC, order_M, ctx.top_k)

    @staticmethod
    def backward(ctx, grad_NC):
        x_MC, both_MI, inner_MI, gate_up_EIC, down_ECI, weight_M1, order_M, ends_E = ctx.saved_tensors
        tile, _ = ctx.rounding
        grad_MC = grad_NC[order_M // ctx.top_k]
        by_inner_MI = _grouped(tile(grad_MC), down_ECI, ends_E)
        grad_down = _grouped(tile(grad_MC.T), tile((inner_MI * weight_M1).T).T, ends_E)
        grad_weight_M = torch.linalg.vecdot(by_inner_MI, inner_MI)
        by_inner_MI.mul_(weight_M1)
        by_both_MI = _swiglu_backward(by_inner_MI, both_MI)
        grad_gate_up = _grouped(tile(by_both_MI.T), tile(x_MC.T).T, ends_E)
        grad_x = _gathered(_grouped(tile(by_both_MI), gate_up_EIC, ends_E), order_M, ctx.top_k)
        grad_weights = torch.empty_like(grad_weight_M).scatter_(0, order_M, grad_weight_M).view(-1, ctx.top_k)
        return grad_x, grad_gate_up, grad_down, grad_weights, None, None, None


def _swiglu_backward(grad_MI: Tensor, both_MI: Tensor) -> Tensor:
    gate_MI, up_MI = both_MI.chunk(2, -1)
    by_both_MI = torch.empty_like(both_MI)
    by_gate_MI, by_up_MI = by_both_MI.chunk(2, -1)
    torch.mul(grad_MI, F.silu(gate_MI), out=by_up_MI)
    torch.ops.aten.silu_backward.grad_input(grad_MI.mul_(up_MI), gate_MI, grad_input=by_gate_MI)
    return by_both_MI


def _gathered(y_MC: Tensor, order_M: Tensor, top_k: int) -> Tensor:
    """Rows back in their tokens' order, summed over each token's experts."""
    back_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    return y_MC[back_M].view(-1, top_k, y_MC.shape[-1]).sum(1)


def _grouped(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """Products group by group: rows of `a` [M, X] by `b` [E, X, Y], or columns of `a` [X, M] by rows of `b` [M, Y];
    group e ends at `ends_E[e]`. torch's own wants 16-byte rows and at most 32 bits; else one product an expert."""
    aligned = all(max(t.stride()[-2:]) * t.element_size() % 16 == 0 for t in (a, b))
    if aligned and a.dtype != torch.float64:
        return F.grouped_mm(a, b, offs=ends_E)
    ends = [0, *ends_E.tolist()]
    pairs = list(pairwise(ends))
    if b.ndim == 3:
        return torch.cat([a[begin:end] @ b[e] for e, (begin, end) in enumerate(pairs)])
    return torch.stack([a[:, begin:end] @ b[begin:end] for begin, end in pairs])
