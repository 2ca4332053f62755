"""Masters, which learn in place of weights in 16 bits, and the sums of their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


class Learned(NamedTuple):
    """A tensor that learns: its name, the model's weight, and the weight's master, which is the weight itself
    where it has none."""

    name: str
    weight: nn.Parameter
    master: nn.Parameter


def copy_masters(weights: Mapping[str, nn.Parameter], device: torch.device | None) -> dict[str, nn.Parameter]:
    """Return masters of weights, by name: copies in float32, or in float64 of weights in float64, on a device
    (None: the weights'). A weight that is so already shares its memory with its master."""
    return {
        name: nn.Parameter(p.detach().to(device or p.device, torch.promote_types(p.dtype, torch.float32)))
        for name, p in weights.items()
    }


class GradientSums:
    """The gradients of weights in 16 bits, summed over the micro-batches of an update.

    The gradients of a single micro-batch stay with the weights, in 16 bits, until the update. From the second
    micro-batch on, gradients are summed in float32, on `device` (None: the weights'): as soon as a backward
    pass has the whole gradient of a weight, it is added and dropped. The weights refer to the sums weakly,
    so that sums that are dropped free their memory.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], device: torch.device | None = None):
        self.weights = dict(weights)
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.micro_batches = 0
        sums = weakref.ref(self)
        for name, weight in self.weights.items():
            weight.register_post_accumulate_grad_hook(_adding_hook(sums, name))

    def begin_micro_batch(self) -> None:
        """Say that a backward pass comes: its gradients are added to those of earlier ones in float32."""
        self.micro_batches += 1
        if self.micro_batches == 2:
            for name in self.weights:
                self.add(name)

    @torch.no_grad()
    def add(self, name: str) -> None:
        """Add the gradient of a weight to its sum, and drop it."""
        weight = self.weights[name]
        if weight.grad is None:
            return
        if name in self.sums:
            self.sums[name] += weight.grad.to(self.sums[name].device)
        else:
            self.sums[name] = weight.grad.to(self.device or weight.device).float()
        weight.grad = None

    def drop(self) -> None:
        """Drop all gradients since the last update."""
        for weight in self.weights.values():
            weight.grad = None
        self.sums = {}
        self.micro_batches = 0


def _adding_hook(sums: weakref.ref[GradientSums], name: str) -> Callable[[Tensor], None]:
    """Return a function that adds a weight's new gradient to its sum, where gradients are summed."""

    def add(weight: Tensor) -> None:
        alive = sums()
        if alive is not None and alive.micro_batches > 1:
            alive.add(name)

    return add
