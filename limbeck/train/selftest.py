"""A self-test of an RL stage before its first update. It finds errors in the choice of the tokens in the
loss, in the sampler, and in the packing of batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..types import LimbeckError, Sample
from .alarms import disagreement
from .batch import Batch
from .learner import Learner
from .losses import Loss, k3

SAMPLES = 4  # number of samples that are tested
WHOLE = 1 << 30  # tokens: a micro-batch so large that it holds all samples
GRADIENT_DIFFERENCE = {4: 1e-3, 2: 5e-2}  # share of the gradient's norm that rounding explains, by bytes


def selftest(
    learner: Learner, samples: Sequence[Sample], loss: Loss, end_id: int, temperature: float
) -> None:
    """Check four things on a few samples: the end-of-turn token is in the loss, the prompt is not, the
    learner's log-probabilities equal the sampler's, and the gradient does not depend on how the batch is
    divided into micro-batches.

    `end_id` is the id of the end-of-turn token. Raises LimbeckError with a remedy if a check fails."""
    finished = [sample for sample in samples if sample.tokens[-1] == end_id]
    tested = (finished or list(samples))[:SAMPLES]
    batches = learner.pack(tested, WHOLE)
    _check_targets(batches, tested, end_id if finished else None)
    _check_sampler(learner, batches, temperature)
    whole = _gradient(learner, batches, loss, temperature)
    parts = _gradient(learner, learner.pack(tested, 1), loss, temperature)
    difference = _difference(whole, parts)
    if difference > GRADIENT_DIFFERENCE[min(4, whole[0].dtype.itemsize)]:
        raise LimbeckError(
            f"self-test: the gradient changes by {difference:.1%} with the micro-batches; please report this"
        )


def _check_targets(batches: Sequence[Batch], samples: Sequence[Sample], end_id: int | None) -> None:
    """Raise LimbeckError if the end-of-turn token `end_id` is not in the loss, or if a token of a prompt
    is."""
    targets_M = torch.cat([batch.targets_M for batch in batches])
    if end_id is not None and int((targets_M == end_id).sum()) < len(samples):
        raise LimbeckError(
            "self-test: the end-of-turn token is not in the loss; check eos_token in tokenizer_config.json"
        )
    if len(targets_M) != sum(len(sample.tokens) - sample.start for sample in samples):
        raise LimbeckError("self-test: the loss sees other tokens than the completions'; please report this")


def _check_sampler(learner: Learner, batches: Sequence[Batch], temperature: float) -> None:
    """Raise LimbeckError if the learner's log-probabilities differ from the sampler's."""
    trainer_M = torch.cat(learner.logprobs(batches, temperature))
    sampler_M = torch.cat([batch.logprobs_M for batch in batches])
    gap = float((trainer_M - sampler_M).abs().max())
    kl = None if learner.exact else float(k3(trainer_M, sampler_M).mean())
    if fault := disagreement(gap, kl):
        raise LimbeckError(
            f"self-test: sampler and learner disagree by {fault} on the same weights; "
            "sample with temperature > 0, and with keep_sampling_mask where top_p < 1, top_k > 0 or min_p > 0"
        )


def _gradient(learner: Learner, batches: Sequence[Batch], loss: Loss, temperature: float) -> list[Tensor]:
    """Return the gradients of all parameters that have one; the learner's are dropped afterwards."""
    for batch in batches:
        # before the first update the reference is the policy, with the sampler's log-probabilities
        batch = replace(batch, reference_M=batch.logprobs_M)
        logprobs_M, _ = learner.forward(batch, temperature)
        loss(logprobs_M, batch)[0].backward()
    gradients = [p.grad for p in learner.trained.values() if p.grad is not None]
    learner.optimizer.drop_gradients()
    return gradients


def _difference(whole: Sequence[Tensor], parts: Sequence[Tensor]) -> float:
    """Return the norm of the difference of two gradients as a share of the norm of the first."""
    norm = sum(float(a.float().square().sum()) for a in whole)
    distance = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(whole, parts, strict=True))
    return (distance / max(norm, 1e-24)) ** 0.5
