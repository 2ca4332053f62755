"""Muon: the optimizer of the weight matrices inside the decoder's blocks.

Dimensions: X matrices · R rows of a matrix · C columns of a matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .masters import Learned

Pair = tuple[Tensor, Tensor]  # a matrix and the direction of its update


class Muon(torch.optim.Optimizer):
    """Muon: momentum updates whose matrices are orthogonalised (Jordan 2024).

    The update is scaled by 0.2 sqrt(larger side of the matrix), so that the same learning rate suits Muon
    and AdamW (Liu et al. 2025, arXiv 2502.16982, eq. 4). Newton-Schulz iterations run in float32, since
    bfloat16 is slow on most CPUs, and on all matrices of equal shape at once. A parameter may hold several
    matrices stacked along its rows, such as a fused projection: `heights` gives, for each parameter, the
    number of rows of each of its matrices."""

    def __init__(
        self,
        learned: list[Learned],
        heights: list[tuple[int, ...]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([tensor.master for tensor in learned], defaults)
        self.learned = learned
        self.heights = heights

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], scale: Tensor, step: int) -> None:
        """Update every parameter that has a gradient. `gradients` are by name, in 16 bits or more, and are
        multiplied by `scale`, in place if they are in float32. The number of the update has no effect."""
        (group,) = self.param_groups
        learned = [
            (tensor, rows)
            for tensor, rows in zip(self.learned, self.heights, strict=True)
            if tensor.name in gradients
        ]
        if not learned:
            return
        masters = [tensor.master for tensor, _ in learned]
        scaled = [gradients[tensor.name].to(tensor.master.dtype) for tensor, _ in learned]
        torch._foreach_mul_(scaled, scale)
        directions = self._directions(masters, scaled, group["momentum"])
        torch._foreach_mul_(masters, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[tuple[int, ...], list[Pair]] = defaultdict(list)
        for (tensor, rows), direction in zip(learned, directions, strict=True):
            for pair in _matrices(tensor.master, direction, rows):
                by_shape[pair[0].shape].append(pair)
        for shape, pairs in by_shape.items():
            matrices = [matrix for matrix, _ in pairs]
            updates = orthogonalize(torch.stack([direction for _, direction in pairs]))
            rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
            torch._foreach_sub_(matrices, updates.unbind(), alpha=rate)
        for tensor, _ in learned:
            if tensor.master is not tensor.weight:
                tensor.weight.copy_(tensor.master)

    def missing_bytes(self) -> int:
        """Return the bytes of the momentum that is not there yet."""
        return sum(one.master.nbytes for one in self.learned if not self.state.get(one.master))

    def _directions(
        self, masters: list[nn.Parameter], gradients: list[Tensor], momentum: float
    ) -> list[Tensor]:
        """Update the momentum of each parameter and return the Nesterov directions, in the parameters'
        shapes [R, C] or [X, R, C]."""
        buffers = []
        for p in masters:
            state = self.state[p]
            buffers.append(state.setdefault("momentum", torch.zeros_like(p)))
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, buffers, momentum)


def _matrices(parameter: Tensor, direction: Tensor, rows: tuple[int, ...]) -> list[Pair]:
    """Return the matrices of a parameter, each with the direction of its update, as views [R, C].

    `rows` is the number of rows of each matrix. A matrix with more rows than columns is transposed."""
    pairs = []
    parts = parameter.flatten(0, -2).split(rows)
    steps = direction.flatten(0, -2).split(rows)
    for matrix, step in zip(parts, steps, strict=True):
        tall = matrix.shape[0] > matrix.shape[1]
        pairs.append((matrix.mT, step.mT) if tall else (matrix, step))
    return pairs


def orthogonalize(matrices_XRC: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise each matrix approximately: `steps` quintic Newton-Schulz iterations bring all its
    singular values close to 1. The matrices must not have more rows than columns."""
    a = 3.4445
    b = -4.7750
    c = 2.0315
    x_XRC = matrices_XRC / (matrices_XRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_XRR = x_XRC @ x_XRC.mT
        polynomial_XRR = torch.baddbmm(gram_XRR, gram_XRR, gram_XRR, beta=b, alpha=c)
        x_XRC = torch.baddbmm(x_XRC, polynomial_XRR, x_XRC, beta=a)
    return x_XRC


def for_muon(name: str, parameter: Tensor) -> bool:
    """Return True if Muon updates the parameter: a matrix [R, C] inside a block, or the stacked matrices of
    experts [X, R, C], but not a router's matrix."""
    return parameter.ndim >= 2 and "block" in name and ".router." not in name
