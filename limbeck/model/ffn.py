"""Feed-forward layers, dense and with experts.

N tokens · C hidden size · I intermediate size · E experts · G groups of experts · K experts of each token · M
tokens or choices that are moved to other experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Experts, ModelConfig
from .context import Context, RouterTrace
from .linear import Linear
from .ops import CPU, Ops
from .ops.experts import EXACT, Rounding

SEED_BITS = 2**63 - 1  # bits of a hash that make a seed: all but the sign


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6).

    Gate and up are computed by one matrix product.
    """

    ops: Ops = CPU

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_NC: Tensor, context: Context | None = None) -> Tensor:
        """Return the output of the layer, [N, C]; `context` is not used."""
        return self.down(self.ops.swiglu(self.gate_up(x_NC)))


class GeGLU(SwiGLU):
    """down(gelu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, eq. 6), GELU in its tanh form."""

    def forward(self, x_NC: Tensor, context: Context | None = None) -> Tensor:
        """Return the output of the layer, [N, C]; `context` is not used."""
        return self.down(self.ops.geglu(self.gate_up(x_NC)))


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
    ops: Ops = CPU

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
            weights_NK = weights_NK / (self.ops.row_sums(weights_NK) + 1e-20)
        weights_NK = (weights_NK * self.experts.scale).to(x_NC.dtype)
        mixed_NC = self.ops.mix_experts(
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
        logits_NE = self.ops.router(x_NC, self.router.weight)
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
        return self.ops.top_k(scores_NE, experts.top_k)

    def _limit_to_groups(self, scores_NE: Tensor) -> Tensor:
        """Return the scores [N, E] with -inf for experts outside each token's best groups.

        The score of a group is that of its best expert (DeepSeek-V2), or the sum of its two best
        (DeepSeek-V3).
        """
        experts = self.experts
        scores_NGE = scores_NE.view(len(scores_NE), experts.groups, -1)
        best_NG = scores_NGE.topk(2, -1).values.sum(-1) if experts.balanced else scores_NGE.amax(-1)
        allowed_NG = torch.zeros_like(best_NG, dtype=torch.bool)
        allowed_NG.scatter_(1, self.ops.top_k(best_NG, experts.top_groups), True)
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
