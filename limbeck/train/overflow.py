"""Numbers that are not finite: which tensor of a step of learning holds them, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..types import LimbeckError
from .batch import Batch

SLOWER = "lower optimizer.learning_rate, or raise optimizer.warmup_steps"
GIVEN = {
    "advantages_M": ("the advantages", "a reward is infinite or not a number, so mend what gives it"),
    "logprobs_M": ("the sampler's log-probabilities", "take a sampling.temperature nearer to 1"),
    "reference_M": ("the reference's log-probabilities", "take a reference whose weights are finite"),
}  # fields of a batch


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite, and their sum of squares is."""
    return math.isfinite(nn.utils.get_total_norm(list(tensors)))


def spoiled(named: Iterable[tuple[str, Tensor]]) -> str:
    """The first of the tensors that holds an infinity or NaN; where none does, the one with the largest number."""
    return max(named, key=lambda one: float(one[1].detach().abs().max().nan_to_num(math.inf)))[0]


def stopped(what: str, remedy: str, step: int, steps: int) -> LimbeckError:
    """The sentence that ends a stage; `step` counts from 0."""
    told = f"optimiser step {step + 1} of {steps}: {what} not finite"
    return LimbeckError(f"{told}; {remedy}; the last checkpoint stays as it is")


def blamed(model: nn.Module, batch: Batch) -> tuple[str, str]:
    """Why the loss of a batch is not finite: the model's weights, what the batch brings, or else the loss itself."""
    if not finite(model.parameters()):
        return (
            f"the weight {spoiled(model.named_parameters())} is",
            "begin with a model whose weights are finite",
        )
    for name, (what, remedy) in GIVEN.items():
        given = getattr(batch, name)
        if given is not None and not finite([given]):
            return f"{what} are", remedy
    if batch.teacher is not None and not finite(_floats(vars(batch.teacher).values())):
        return (
            "the teacher's logits are",
            "take a teacher whose weights are finite, and make its labels again",
        )
    return "the loss is", SLOWER


def _floats(tensors: Iterable[Tensor]) -> Sequence[Tensor]:
    return [tensor for tensor in tensors if tensor.is_floating_point()]
