"""Scores of predicted tokens in torch: log-probabilities, entropies and their gradients.

The logits of a row are computed whole or, under a head of very many ids, a span of ids at a time. Where a row
has a quarter of a million logits, few rows fit into memory at once, and each few would read the whole head,
and read and write its whole gradient. Span by span all rows are computed together, and head and gradient are
passed once (Cut Cross-Entropy, arXiv 2411.09009, section 4).

R predictions · C hidden size · V vocabulary · T ids of a span · K ids that sampling left.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .table import Predictions

WIDE = 1 << 16  # ids up to which the logits of a row are computed whole
SPAN = 1 << 12  # ids of a span


def score(predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities of the targets and the entropies, both [R]; nothing else is needed."""
    logp_RV = _log_softmax(predictions)
    logprob_R = logp_RV.gather(1, predictions.targets_R.unsqueeze(1)).squeeze(1)
    entropy_R = -(logp_RV.exp() * logp_RV.nan_to_num(neginf=0.0)).sum(1)
    return logprob_R, entropy_R, logprob_R.new_empty(0)


def score_backward(predictions: Predictions, grad_R: Tensor, by_head_VC: Tensor | None) -> Tensor:
    """Return the gradient by the hidden states [R, C], and add that by the head to `by_head_VC`."""
    hidden_RC, head_VC, targets_R, temperature, _ = predictions
    grad_R1 = grad_R.unsqueeze(1)
    grad_RV = -_log_softmax(predictions).exp_() * grad_R1
    grad_RV.scatter_add_(1, targets_R.unsqueeze(1), grad_R1)
    grad_RV /= temperature
    if by_head_VC is not None:
        by_head_VC.addmm_(grad_RV.T, hidden_RC.to(grad_RV.dtype))
    return torch.mm(grad_RV, head_VC.to(grad_RV.dtype)).to(hidden_RC.dtype)


def _log_softmax(predictions: Predictions) -> Tensor:
    """Return the log-probabilities of all ids [R, V], in float32 or better."""
    hidden_RC, head_VC, _, temperature, kept_RK = predictions
    precision = torch.promote_types(hidden_RC.dtype, torch.float32)
    logits_RV = hidden_RC.to(precision) @ head_VC.to(precision).T
    if temperature != 1.0:
        logits_RV /= temperature
    if kept_RK is not None:
        exclude(logits_RV, kept_RK)
    return torch.log_softmax(logits_RV, -1)


def exclude(logits_RV: Tensor, kept_RK: Tensor) -> Tensor:
    """Set the logits of all ids that are not in `kept_RK` to minus infinity, in place; return them [R, V]."""
    outside_RV = torch.ones_like(logits_RV, dtype=torch.bool).scatter_(1, kept_RK.clamp(min=0), False)
    # padding is -1 and so clamped to id 0, which is inside only where the sampler kept it
    outside_RV[:, 0] = ~(kept_RK == 0).any(1)
    return logits_RV.masked_fill_(outside_RV, float("-inf"))


# ---------------------------------------------------------------- a span of ids at a time


def score_in_spans(predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    """Return the targets' log-probabilities, the entropies and the log of the sums of exponentials, all [R].

    With w = exp(logit - the largest logit so far), S is the sum of w over the ids and E that of -w ln w; the
    entropy is ln S + E / S. A larger logit multiplies earlier w by k: S becomes k S, and E becomes
    k E - k ln k S.
    """
    hidden_RC, _, targets_R, *_ = predictions
    shape, precision = hidden_RC.shape[:1], torch.promote_types(hidden_RC.dtype, torch.float32)
    most_R = hidden_RC.new_full(shape, torch.finfo(precision).min, dtype=precision)
    sum_R, spread_R, target_R = hidden_RC.new_zeros(3, *shape, dtype=precision)
    for begin, logits_RT in _spans(predictions):
        place_R, inside_R = _places(targets_R, begin, logits_RT.shape[1])
        found_R = logits_RT.gather(1, place_R.unsqueeze(1)).squeeze(1)
        target_R = torch.where(inside_R, found_R, target_R)
        before_R, most_R = most_R, torch.maximum(most_R, logits_RT.amax(1))
        shrink_R = (before_R - most_R).exp()
        weight_RT = logits_RT.sub_(most_R.unsqueeze(1)).exp_()
        spread_R = shrink_R * spread_R + torch.special.entr(shrink_R) * sum_R
        sum_R = shrink_R * sum_R + weight_RT.sum(1)
        spread_R = spread_R + torch.special.entr(weight_RT).sum(1)
    log_sum_R = sum_R.log()
    return target_R - most_R - log_sum_R, log_sum_R + spread_R / sum_R, most_R + log_sum_R


def score_in_spans_backward(
    predictions: Predictions, grad_R: Tensor, logsumexp_R: Tensor, by_head_VC: Tensor | None
) -> Tensor:
    """Return the gradient by the hidden states [R, C], and add that by the head to `by_head_VC`."""
    hidden_RC, head_VC, targets_R, temperature, _ = predictions
    precision = logsumexp_R.dtype
    hidden = hidden_RC.to(precision)
    by_hidden_RC = torch.zeros_like(hidden)
    for begin, by_RT in _spans(predictions):
        by_RT.sub_(logsumexp_R.unsqueeze(1)).exp_().mul_(-grad_R.unsqueeze(1))
        place_R, inside_R = _places(targets_R, begin, by_RT.shape[1])
        by_RT.scatter_add_(1, place_R.unsqueeze(1), (grad_R * inside_R).unsqueeze(1))
        if temperature != 1.0:
            by_RT /= temperature
        span = slice(begin, begin + by_RT.shape[1])
        by_hidden_RC.addmm_(by_RT, head_VC[span].to(precision))
        if by_head_VC is not None:
            by_head_VC[span].addmm_(by_RT.T, hidden)
    return by_hidden_RC.to(hidden_RC.dtype)


def _spans(predictions: Predictions) -> Iterator[tuple[int, Tensor]]:
    """Yield the first id of each span and its logits [R, T], divided by the temperature; those of ids that
    sampling excluded are minus infinity."""
    hidden_RC, head_VC, _, temperature, kept_RK = predictions
    precision = torch.promote_types(hidden_RC.dtype, torch.float32)
    hidden_RC = hidden_RC.to(precision)
    for begin in range(0, len(head_VC), SPAN):
        head_TC = head_VC[begin : begin + SPAN].to(precision)
        logits_RT = hidden_RC @ head_TC.T
        if temperature != 1.0:
            logits_RT /= temperature
        if kept_RK is not None:
            place_RK = kept_RK - begin
            exclude(logits_RT, place_RK.masked_fill((place_RK < 0) | (place_RK >= len(head_TC)), -1))
        yield begin, logits_RT


def _places(targets_R: Tensor, begin: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the targets' columns in a span [R], and whether they are in it [R]; those outside get any."""
    place_R = targets_R - begin
    return place_R.clamp(0, width - 1), (place_R >= 0) & (place_R < width)
