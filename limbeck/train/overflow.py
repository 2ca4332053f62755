"""Diagnosis of a training step in which a number overflowed: which tensor holds an infinity or NaN, and what
the user can do."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from ..types import LimbeckError
from .batch import Batch

SLOWER = "lower optimizer.learning_rate, or raise optimizer.warmup_steps"
# Fields of a batch: their name in a sentence, and a remedy.
BATCH_FIELDS = {
    "advantages_M": ("the advantages", "a reward is infinite or not a number, so mend what gives it"),
    "logprobs_M": ("the sampler's log-probabilities", "take a sampling.temperature nearer to 1"),
    "reference_M": ("the reference's log-probabilities", "take a reference whose weights are finite"),
}


def finite(tensors: Iterable[Tensor]) -> bool:
    """Return True if all numbers of the tensors are finite, and the sum of their squares is finite too."""
    return math.isfinite(nn.utils.get_total_norm(list(tensors)))


def spoiled(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the name of the first tensor that holds an infinity or NaN. If no tensor does, return the name
    of the tensor with the largest absolute number."""

    def magnitude(item: tuple[str, Tensor]) -> float:
        """Return the largest absolute number of a named tensor; infinity if it holds NaN."""
        largest = item[1].detach().abs().max()
        return float(largest.nan_to_num(math.inf))

    return max(named, key=magnitude)[0]


def stopped(subject: str, remedy: str, step: int, steps: int) -> LimbeckError:
    """Return the error that ends a stage at `step`, which counts from 0, of `steps`. `subject` begins its
    sentence, as in "the gradient of head.weight is"; `remedy` says what the user can do."""
    sentence = f"optimiser step {step + 1} of {steps}: {subject} not finite"
    return LimbeckError(f"{sentence}; {remedy}; the last checkpoint stays as it is")


def blamed(model: nn.Module, batch: Batch) -> tuple[str, str]:
    """Find the cause of a loss that is not finite: a weight, a field of the batch, the teacher, or else the
    loss itself. Return the beginning of a sentence that names it, and a remedy."""
    if not finite(model.parameters()):
        weight = spoiled(model.named_parameters())
        return f"the weight {weight} is", "begin with a model whose weights are finite"
    for name, (noun, remedy) in BATCH_FIELDS.items():
        tensor = getattr(batch, name)
        if tensor is not None and not finite([tensor]):
            return f"{noun} are", remedy
    if batch.teacher is not None:
        tensors = [tensor for tensor in vars(batch.teacher).values() if tensor.is_floating_point()]
        if not finite(tensors):
            remedy = "take a teacher whose weights are finite, and make its labels again"
            return "the teacher's logits are", remedy
    return "the loss is", SLOWER
