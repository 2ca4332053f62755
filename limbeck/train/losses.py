"""Losses, all with one signature: (logprobs_M, or what makes the logits, batch) -> (loss, metrics).

Each is a sum over a micro-batch divided by counts of the whole batch, so micro-batches add up. Metrics are
shares of the batch's mean and add up too, but for those named `max_...`, of which the largest counts.
M predicted tokens · S sequences · P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.parts import Policy
from ..types import Group
from .batch import Batch
from .divergence import Logits, divergence, forward_kl, jensen_shannon, reverse_kl

Metrics = dict[str, Tensor]
Loss = Callable[["Tensor | Logits", Batch], tuple[Tensor, Metrics]]


def cross_entropy(logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
    """Mean negative log-likelihood of the predicted tokens."""
    loss = -logprobs_M.sum() / batch.tokens
    return loss, {"loss": loss.detach()}


def distill(kind: str, beta: float = 0.5) -> Loss:
    """Mean divergence of the student's next token from the teacher's, over the predicted tokens: `forward` KL, `reverse`
    KL, or `jsd` with `beta` (train/divergence.py). The batch brings the teacher; both sides' logits are divided by one
    temperature, and the loss is not multiplied by its square."""
    measure = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jensen_shannon(beta)}[kind]

    def loss(logits: Logits, batch: Batch) -> tuple[Tensor, Metrics]:
        total, _, entropy_M = divergence(logits, batch.teacher, measure)
        value = total / batch.tokens
        return value, {"loss": value.detach(), "entropy": entropy_M.sum() / batch.tokens}

    return loss


def text_distance(logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
    """Half the squared difference of what student and teacher think of each span of text, over the predicted tokens. It
    is zero only where they agree, and on the student's own samples its gradient is in expectation that of the reverse KL
    of spans: E[(log q - log p) grad log q]."""
    inside_M = batch.spans_M >= 0
    spans = int(batch.spans_M.max()) + 1
    gap_M = (logprobs_M - batch.reference_M)[inside_M]
    gap_J = logprobs_M.new_zeros(spans).index_add(0, batch.spans_M[inside_M], gap_M)
    value = gap_J.square().sum() / 2 / batch.tokens
    reverse = (
        gap_J.detach().sum() / batch.tokens
    )  # on the student's own samples an estimate of the KL a token
    return value, {"loss": value.detach(), "reverse_kl": reverse}


def preference(beta: float, normalized: bool = False) -> Loss:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): -log sigmoid(beta (gain of the better - of the worse)), a
    gain being the sum of log pi / reference over a response's tokens, or, `normalized`, their mean."""

    def loss(logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        gain_S = logprobs_M.new_zeros(len(batch.lengths_S)).index_add(
            0, batch.rows_M, logprobs_M - batch.reference_M
        )
        gain_S = beta * (gain_S / batch.lengths_S if normalized else gain_S)
        margin_P = _margins(gain_S, batch.pairs_S)
        pairs = batch.sequences / 2
        value = -F.logsigmoid(margin_P).sum() / pairs
        better_S = batch.pairs_S > 0
        metrics = {
            "loss": value,
            "margin": margin_P.sum() / pairs,
            "preferred": (margin_P > 0).float().sum() / pairs,
            "chosen": gain_S[better_S].sum() / pairs,
            "rejected": gain_S[~better_S].sum() / pairs,
        }
        return value, {name: metric.detach() for name, metric in metrics.items()}

    return loss


def _margins(gain_S: Tensor, pairs_S: Tensor) -> Tensor:
    """Better minus worse of each pair [P]; both halves must be here, and once."""
    _, which_S, count_P = pairs_S.abs().unique(return_inverse=True, return_counts=True)
    balance_P = torch.zeros_like(count_P).index_add(0, which_S, pairs_S.sign())
    if int((count_P != 2).sum()) or int(balance_P.abs().sum()):
        raise ValueError("a pair is not whole: its halves need one prompt, and each a token to learn")
    return gain_S.new_zeros(len(count_P)).index_add(0, which_S, gain_S * pairs_S.sign())


def policy_gradient(policy: Policy, longest: int = 1) -> Loss:
    """GRPO's clipped surrogate (arXiv 2402.03300 eq. 3; clip-higher and token mean from arXiv 2503.14476).

    ratio = pi / pi_old per token; the loss is -min(ratio A, clip(ratio, 1 - low, 1 + high) A), plus
    `kl_coef` times the k3 estimate of KL(pi || reference). DeepSeek-V3.2 (arXiv 2512.02556, section 3.1):
    `kl_unbiased` weighs k3 by the ratio; `off_policy_threshold` leaves sequences with a negative advantage
    whose mean KL(pi_old || pi) is above it out of the surrogate, not out of the KL term.
    """

    def loss(logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        drift_M = logprobs_M - batch.logprobs_M
        ratio_M = drift_M.exp()
        clipped_M = ratio_M.clamp(1 - policy.clip_low, 1 + policy.clip_high)
        gain_M = torch.minimum(ratio_M * batch.advantages_M, clipped_M * batch.advantages_M)
        weight_M = token_weights(policy.reduction, batch, longest)
        if policy.off_policy_threshold is not None:
            gain_M = gain_M * _on_policy(drift_M.detach(), batch, policy.off_policy_threshold)
        total = -(gain_M * weight_M).sum()
        metrics = _drift_metrics(drift_M.detach(), ratio_M.detach(), clipped_M.detach(), batch)
        if policy.kl_coef:
            kl_M = k3(logprobs_M, batch.reference_M)
            kl_M = kl_M * ratio_M if policy.kl_unbiased else kl_M
            total = total + policy.kl_coef * (kl_M * weight_M).sum()
            metrics["kl_reference"] = kl_M.detach().sum() / batch.tokens
        return total, {"loss": total.detach(), **metrics}

    return loss


def token_weights(reduction: str, batch: Batch, longest: int) -> Tensor:
    """What one token's loss counts: 1 / all tokens; or 1 / (sequences x its sequence's length), as GRPO
    wrote it; or 1 / (sequences x longest possible), Dr. GRPO's constant (arXiv 2503.20783)."""
    if reduction == "token":
        return torch.full_like(batch.advantages_M, 1 / batch.tokens)
    if reduction == "sequence":
        return 1 / (batch.sequences * batch.lengths_S[batch.rows_M])
    return torch.full_like(batch.advantages_M, 1 / (batch.sequences * longest))


def k3(logprobs_M: Tensor, reference_M: Tensor) -> Tensor:
    """Schulman's k3: r - log r - 1 with r = reference / policy; never negative."""
    difference_M = reference_M - logprobs_M
    return difference_M.exp() - difference_M - 1


def _on_policy(drift_M: Tensor, batch: Batch, threshold: float) -> Tensor:
    """1 for the tokens of sequences worth learning from, 0 for stale failures."""
    total_S = drift_M.new_zeros(len(batch.lengths_S)).index_add_(0, batch.rows_M, -drift_M)
    stale_M = (total_S / batch.lengths_S > threshold)[batch.rows_M]
    return 1.0 - (stale_M & (batch.advantages_M < 0)).float()


def _drift_metrics(drift_M: Tensor, ratio_M: Tensor, clipped_M: Tensor, batch: Batch) -> Metrics:
    return {
        "clipped": (ratio_M != clipped_M).float().sum() / batch.tokens,
        "kl_old": (ratio_M - drift_M - 1).sum() / batch.tokens,
        "max_drift": drift_M.abs().max(),
    }


def group_advantages(groups: Sequence[Group], scale: str) -> list[np.ndarray]:
    """Reward minus the group's mean; divided by the group's deviation (GRPO), the batch's, or nothing.

    The group's is the sample deviation plus 1e-4, as TRL computes it. A group of equal rewards gives zeros.
    """
    centred = [np.asarray(g.rewards) - np.mean(g.rewards) for g in groups]
    if scale == "group":
        return [c / (np.std(g.rewards, ddof=1) + 1e-4) for c, g in zip(centred, groups, strict=True)]
    if scale == "batch" and groups:
        spread = np.std(np.concatenate([g.rewards for g in groups]), ddof=1) + 1e-4
        return [c / spread for c in centred]
    return centred
