"""Losses. Each is called as `loss(logprobs_M, batch)`, or with the student's `Logits` in the place of
`logprobs_M`, and returns the loss and a dictionary of metrics.

Each is a frozen dataclass of its settings, called on one micro-batch. The result is a sum over the
micro-batch divided by counts of the whole batch, so the losses of all micro-batches add up to the loss of the
batch. Metrics add up in the same way, except those named `max_...`, of which the largest is taken. The losses
of pairs are in dpo.py and reward_model.py.

Dimensions: M predicted tokens · S sequences · J spans of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..config.parts import Policy
from .batch import Batch
from .divergence import Logits, Measure, divergence, forward_kl, jensen_shannon, reverse_kl

TRUNCATION = 2.0  # the largest weight of a token that another engine sampled
Metrics = dict[str, Tensor]
Loss = Callable[["Tensor | Logits", Batch], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class CrossEntropy:
    """The mean negative log-likelihood of the predicted tokens."""

    def __call__(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss and metrics of a micro-batch, from the log-probabilities [M] of its target
        tokens."""
        loss = -logprobs_M.sum() / batch.tokens
        return loss, {"loss": loss.detach()}


# ---------------------------------------------------------------- distillation


@dataclass(frozen=True)
class Distillation:
    """The mean divergence, over the predicted tokens, of the student's next-token distribution from the
    teacher's.

    `kind` is `forward` for the forward KL, `reverse` for the reverse KL, or `jsd` for the generalised
    Jensen-Shannon divergence with the weight `beta` (train/divergence.py). The teacher's distribution is in
    the batch. The logits of student and teacher are divided by the same temperature; the loss is not
    multiplied by the squared temperature."""

    kind: Literal["forward", "reverse", "jsd"]
    beta: float = 0.5

    def __call__(self, logits: Logits, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss and metrics of a micro-batch, from the student's logits at its predictions."""
        total, _, entropy_M = divergence(logits, batch.teacher, self._measure())
        loss = total / batch.tokens
        return loss, {"loss": loss.detach(), "entropy": entropy_M.sum() / batch.tokens}

    def _measure(self) -> Measure:
        """Return the divergence function of train/divergence.py that `kind` names."""
        if self.kind == "jsd":
            return jensen_shannon(self.beta)
        return forward_kl if self.kind == "forward" else reverse_kl


@dataclass(frozen=True)
class SpanDistance:
    """The loss of distillation between models with different tokenizers: half the squared difference between
    the student's and the teacher's log-probability of each span of text, summed over the spans and divided
    by the number of predicted tokens.

    It is zero only where the two agree on every span. On samples that the student made, its gradient is, in
    expectation, that of the reverse KL between the distributions of spans: E[(log q - log p) grad log q],
    with q of the student and p of the teacher."""

    def __call__(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss and metrics of a micro-batch. `batch.reference_M` holds, at the last token of each
        span, the teacher's log-probability of the span."""
        inside_M = batch.spans_M >= 0
        spans = int(batch.spans_M.max()) + 1
        difference_M = (logprobs_M - batch.reference_M)[inside_M]
        difference_J = logprobs_M.new_zeros(spans).index_add(0, batch.spans_M[inside_M], difference_M)
        loss = difference_J.square().sum() / 2 / batch.tokens
        # on the student's own samples an estimate of the reverse KL per token
        reverse = difference_J.detach().sum() / batch.tokens
        return loss, {"loss": loss.detach(), "reverse_kl": reverse}


# ---------------------------------------------------------------- reinforcement learning


@dataclass(frozen=True)
class PolicyGradient:
    """GRPO's clipped surrogate loss (arXiv 2402.03300, eq. 3; clip-higher and token mean from arXiv
    2503.14476).

    The importance ratio of a token is pi / pi_old: its probability under the learner divided by its
    probability at sampling. With the advantage A, the loss is -min(ratio A, clip(ratio, 1 - low, 1 + high)
    A), plus `kl_coef` times the k3 estimate of KL(pi || reference). Two settings follow DeepSeek-V3.2 (arXiv
    2512.02556, section 3.1). `kl_unbiased` multiplies k3 by the importance ratio. `off_policy_threshold`
    excludes sequences from the surrogate, but not from the KL term, if their advantage is negative and their
    mean estimate of KL(pi_old || pi) is above the threshold. `max_new_tokens` is the constant divisor of Dr.
    GRPO's reduction."""

    policy: Policy
    max_new_tokens: int = 1

    def __call__(self, logprobs_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss and metrics of a micro-batch, from the learner's log-probabilities [M] of the
        sampled tokens."""
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


def correct(batches: Sequence[Batch], old: Sequence[Tensor]) -> tuple[list[Batch], Mapping[str, float]]:
    """Return the micro-batches of one update, corrected by truncated importance sampling, and metrics: for
    completions that another engine sampled with the learner's weights, but with other rounding (Yao et al.
    2025, "Your efficient RL framework secretly brings you off-policy RL training").

    `old` are the learner's log-probabilities [M] before the first update, one tensor for each micro-batch.
    They take the place of the sampler's, so the ratio that is clipped is the learner's alone, and each
    token's advantage is multiplied by min(pi_old / pi_sampler, `TRUNCATION`). Metrics: `gap`, the largest
    difference between the two in nats; `gap_kl`, the k3 estimate of KL(sampler || learner);
    `truncated_weights`, the share of tokens whose weight was cut."""
    sampler_M = torch.cat([batch.logprobs_M for batch in batches])
    old_M = torch.cat(list(old))
    ratio_M = (old_M - sampler_M).exp()
    metrics = {
        "gap": float((old_M - sampler_M).abs().max()),
        "gap_kl": float(k3(sampler_M, old_M).mean()),
        "truncated_weights": float((ratio_M > TRUNCATION).float().mean()),
    }
    weights = ratio_M.clamp(max=TRUNCATION).split([len(part_M) for part_M in old])
    return [
        replace(batch, logprobs_M=part_M, advantages_M=batch.advantages_M * weight_M)
        for batch, part_M, weight_M in zip(batches, old, weights, strict=True)
    ], metrics


def token_weights(reduction: str, batch: Batch, max_new_tokens: int) -> Tensor:
    """Return the factor [M] by which the loss of each token is multiplied.

    For `reduction` `token` it is 1 / (all tokens of the batch). For `sequence`, GRPO's original, it is 1 /
    (sequences x length of the token's sequence). Otherwise it is 1 / (sequences x max_new_tokens), the
    constant of Dr. GRPO (arXiv 2503.20783)."""
    if reduction == "token":
        return torch.full_like(batch.advantages_M, 1 / batch.tokens)
    if reduction == "sequence":
        return 1 / (batch.sequences * batch.lengths_S[batch.rows_M])
    return torch.full_like(batch.advantages_M, 1 / (batch.sequences * max_new_tokens))


def k3(logprobs_M: Tensor, reference_M: Tensor) -> Tensor:
    """Return Schulman's k3 estimate of KL(policy || reference) for each token [M]: r - log r - 1, where r is
    the reference's probability divided by the policy's. It is never negative."""
    log_ratio_M = reference_M - logprobs_M
    return log_ratio_M.exp() - log_ratio_M - 1


def _loss_mask(log_ratio_M: Tensor, batch: Batch, threshold: float) -> Tensor:
    """Return a mask [M]: 0 for the tokens of a sequence that has a negative advantage and whose mean
    estimate of KL(pi_old || pi) is above `threshold`, 1 for all other tokens."""
    total_S = log_ratio_M.new_zeros(len(batch.lengths_S)).index_add_(0, batch.rows_M, -log_ratio_M)
    stale_S = total_S / batch.lengths_S > threshold
    stale_M = stale_S[batch.rows_M]
    return 1.0 - (stale_M & (batch.advantages_M < 0)).float()


def _ratio_metrics(
    log_ratio_M: Tensor, importance_ratio_M: Tensor, clipped_M: Tensor, tokens: int
) -> Metrics:
    """Return metrics of the importance ratios: the share of tokens that were clipped, the k3 estimate of
    KL(pi || pi_old), and the largest absolute log-ratio. `tokens` is the number of predicted tokens of the
    whole batch."""
    return {
        "clipped": (importance_ratio_M != clipped_M).float().sum() / tokens,
        "kl_old": (importance_ratio_M - log_ratio_M - 1).sum() / tokens,
        "max_drift": log_ratio_M.abs().max(),
    }
