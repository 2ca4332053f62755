"""Losses, all with one signature: (logprobs_M, or the student's `Logits`, batch) -> (loss, metrics).

Each is a frozen dataclass of its settings, called on a micro-batch. The loss is a sum over the micro-batch
divided by counts of the whole batch, so micro-batches add up. So do metrics, each a share of the batch's
mean, except those named `max_...`, of which the largest counts. M predicted tokens · S sequences · P pairs ·
J spans of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.parts import Policy
from ..types import Group
from .batch import Batch
from .divergence import Logits, Measure, divergence, forward_kl, jensen_shannon, reverse_kl

Metrics = dict[str, Tensor]
Loss = Callable[["Tensor | Logits", Batch], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class CrossEntropy:
    """Mean negative log-likelihood of the predicted tokens."""

    def __call__(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a micro-batch, from the log-probabilities [M] of its targets."""
        loss = -logprobs_M.sum() / batch.tokens
        return loss, {"loss": loss.detach()}


# ---------------------------------------------------------------- distillation


@dataclass(frozen=True)
class Distillation:
    """Mean divergence of the student's next-token distribution from the teacher's, over the predicted tokens.

    `kind` is `forward` KL, `reverse` KL, or `jsd` with `beta` (train/divergence.py). The teacher is in the
    batch. One temperature divides both sides' logits; the loss is not multiplied by its square."""

    kind: Literal["forward", "reverse", "jsd"]
    beta: float = 0.5

    def __call__(self, logits: Logits, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a micro-batch, from the student's logits at its predictions."""
        total, _, entropy_M = divergence(logits, batch.teacher, self._measure())
        loss = total / batch.tokens
        return loss, {"loss": loss.detach(), "entropy": entropy_M.sum() / batch.tokens}

    def _measure(self) -> Measure:
        """The function of train/divergence.py that `kind` names."""
        if self.kind == "jsd":
            return jensen_shannon(self.beta)
        return forward_kl if self.kind == "forward" else reverse_kl


@dataclass(frozen=True)
class SpanDistance:
    """Distillation across tokenizers: half the squared difference of student's and teacher's log-probability
    of each span of text, summed and divided by the predicted tokens.

    It is zero only where both agree. On the student's own samples its gradient is, in expectation, that of
    the reverse KL of spans: E[(log q - log p) grad log q]."""

    def __call__(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a micro-batch; `batch.reference_M` holds the teacher's log-probability of each
        span at its last token."""
        inside_M = batch.spans_M >= 0
        spans = int(batch.spans_M.max()) + 1
        difference_M = (logprobs_M - batch.reference_M)[inside_M]
        difference_J = logprobs_M.new_zeros(spans).index_add(0, batch.spans_M[inside_M], difference_M)
        loss = difference_J.square().sum() / 2 / batch.tokens
        # on the student's own samples an estimate of the reverse KL per token
        reverse = difference_J.detach().sum() / batch.tokens
        return loss, {"loss": loss.detach(), "reverse_kl": reverse}


# ---------------------------------------------------------------- preferences


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): -log sigmoid(reward of chosen - reward of
    rejected).

    The implicit reward of a response is beta times the sum of log(pi / reference) over its tokens, or,
    `normalized`, their mean."""

    beta: float
    normalized: bool = False

    def __call__(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a micro-batch of whole pairs (`batch.pairs_S`)."""
        log_ratio_M = logprobs_M - batch.reference_M
        reward_S = logprobs_M.new_zeros(len(batch.lengths_S)).index_add(0, batch.rows_M, log_ratio_M)
        if self.normalized:
            reward_S = reward_S / batch.lengths_S
        reward_S = self.beta * reward_S
        margin_P = pair_margins(reward_S, batch.pairs_S)
        pairs = batch.sequences / 2
        loss = -F.logsigmoid(margin_P).sum() / pairs
        chosen_S = batch.pairs_S > 0
        metrics = {
            "loss": loss,
            "margin": margin_P.sum() / pairs,
            "preferred": (margin_P > 0).float().sum() / pairs,
            "chosen": reward_S[chosen_S].sum() / pairs,
            "rejected": reward_S[~chosen_S].sum() / pairs,
        }
        return loss, {name: metric.detach() for name, metric in metrics.items()}


@dataclass(frozen=True)
class BradleyTerry:
    """A reward model's loss (Bradley and Terry 1952): -log sigmoid(value of chosen - value of rejected), the
    mean over pairs. Each sequence has one prediction, its value."""

    def __call__(self, values_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a micro-batch of whole pairs (`batch.pairs_S`)."""
        values_S = values_M.new_zeros(len(batch.lengths_S)).index_add(0, batch.rows_M, values_M)
        margin_P = pair_margins(values_S, batch.pairs_S)
        pairs = batch.sequences / 2
        loss = F.softplus(-margin_P).sum() / pairs
        margin_P = margin_P.detach()
        accuracy = (margin_P > 0).float().sum() / pairs
        return loss, {"loss": loss.detach(), "accuracy": accuracy, "margin": margin_P.sum() / pairs}


def pair_margins(reward_S: Tensor, pairs_S: Tensor) -> Tensor:
    """Reward of the chosen response minus that of the rejected one, for each pair [P].

    Raises ValueError if a pair lacks one of its two responses, or has one twice.
    """
    _, pair_S, count_P = pairs_S.abs().unique(return_inverse=True, return_counts=True)
    balance_P = torch.zeros_like(count_P).index_add(0, pair_S, pairs_S.sign())
    if int((count_P != 2).sum()) or int(balance_P.abs().sum()):
        raise ValueError("a pair is not whole: its halves need one prompt, and each a token to learn")
    return reward_S.new_zeros(len(count_P)).index_add(0, pair_S, reward_S * pairs_S.sign())


# ---------------------------------------------------------------- reinforcement learning


@dataclass(frozen=True)
class PolicyGradient:
    """GRPO's clipped surrogate (arXiv 2402.03300 eq. 3; clip-higher and token mean from arXiv 2503.14476).

    With the importance ratio pi / pi_old per token, the loss is -min(ratio A, clip(ratio, 1 - low, 1 + high)
    A), plus `kl_coef` times the k3 estimate of KL(pi || reference). DeepSeek-V3.2 (arXiv 2512.02556, section
    3.1): `kl_unbiased` weights k3 by the ratio; `off_policy_threshold` leaves sequences with a negative
    advantage whose mean KL(pi_old || pi) is above it out of the surrogate, not out of the KL term.
    `max_new_tokens` is the constant of Dr. GRPO's reduction."""

    policy: Policy
    max_new_tokens: int = 1

    def __call__(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a micro-batch, from the policy's log-probabilities [M] of the sampled
        tokens."""
        policy = self.policy
        log_ratio_M = logprobs_M - batch.logprobs_M
        importance_ratio_M = log_ratio_M.exp()
        clipped_M = importance_ratio_M.clamp(1 - policy.clip_low, 1 + policy.clip_high)
        surrogate_M = torch.minimum(importance_ratio_M * batch.advantages_M, clipped_M * batch.advantages_M)
        weight_M = token_weights(policy.reduction, batch, self.max_new_tokens)
        if policy.off_policy_threshold is not None:
            surrogate_M = surrogate_M * _loss_mask(log_ratio_M.detach(), batch, policy.off_policy_threshold)
        loss = -(surrogate_M * weight_M).sum()
        metrics = _ratio_metrics(
            log_ratio_M.detach(), importance_ratio_M.detach(), clipped_M.detach(), batch.tokens
        )
        if policy.kl_coef:
            kl_M = k3(logprobs_M, batch.reference_M)
            if policy.kl_unbiased:
                kl_M = kl_M * importance_ratio_M
            loss = loss + policy.kl_coef * (kl_M * weight_M).sum()
            metrics["kl_reference"] = kl_M.detach().sum() / batch.tokens
        return loss, {"loss": loss.detach(), **metrics}


def token_weights(reduction: str, batch: Batch, max_new_tokens: int) -> Tensor:
    """The weight [M] of each token's loss: 1 / all tokens; or 1 / (sequences x its sequence's length), GRPO's
    original; or 1 / (sequences x max_new_tokens), Dr. GRPO's constant (arXiv 2503.20783)."""
    if reduction == "token":
        return torch.full_like(batch.advantages_M, 1 / batch.tokens)
    if reduction == "sequence":
        return 1 / (batch.sequences * batch.lengths_S[batch.rows_M])
    return torch.full_like(batch.advantages_M, 1 / (batch.sequences * max_new_tokens))


def k3(logprobs_M: Tensor, reference_M: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token [M]: r - log r - 1 with r = reference /
    policy, never negative."""
    log_ratio_M = reference_M - logprobs_M
    return log_ratio_M.exp() - log_ratio_M - 1


def _loss_mask(log_ratio_M: Tensor, batch: Batch, threshold: float) -> Tensor:
    """1 for tokens of sequences to learn from, 0 for those of stale sequences with a negative advantage
    [M]."""
    total_S = log_ratio_M.new_zeros(len(batch.lengths_S)).index_add_(0, batch.rows_M, -log_ratio_M)
    stale_S = total_S / batch.lengths_S > threshold
    stale_M = stale_S[batch.rows_M]
    return 1.0 - (stale_M & (batch.advantages_M < 0)).float()


def _ratio_metrics(
    log_ratio_M: Tensor, importance_ratio_M: Tensor, clipped_M: Tensor, tokens: int
) -> Metrics:
    """Share of clipped tokens, k3 estimate of KL(pi || pi_old), and the largest log-ratio, from values
    [M]."""
    return {
        "clipped": (importance_ratio_M != clipped_M).float().sum() / tokens,
        "kl_old": (importance_ratio_M - log_ratio_M - 1).sum() / tokens,
        "max_drift": log_ratio_M.abs().max(),
    }


def group_advantages(groups: Sequence[Group], scale: str) -> list[np.ndarray]:
    """Advantages, one array per group: reward minus the group's mean; divided by the group's standard
    deviation (GRPO), by the batch's, or by nothing.

    The group's is the sample deviation plus 1e-4, as TRL computes it. A group of equal rewards gives zeros.
    """
    centred = [np.asarray(group.rewards) - np.mean(group.rewards) for group in groups]
    if scale == "group":
        deviations = [np.std(group.rewards, ddof=1) + 1e-4 for group in groups]
        return [rewards / deviation for rewards, deviation in zip(centred, deviations, strict=True)]
    if scale == "batch" and groups:
        deviation = np.std(np.concatenate([group.rewards for group in groups]), ddof=1) + 1e-4
        return [rewards / deviation for rewards in centred]
    return centred
