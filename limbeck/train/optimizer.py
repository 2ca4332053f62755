"""AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

X matrices · R rows · C columns.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from ..config.parts import Optimizer as Settings
from ..model.decoder import Decoder

Pair = tuple[Tensor, Tensor]  # a matrix and the direction of its update


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan 2024); the update is scaled by 0.2 sqrt(larger side), so that one
    learning rate fits Muon and AdamW (Liu et al. 2025, arXiv 2502.16982, eq. 4).

    Newton-Schulz runs in float32 (bfloat16 is slow on most CPUs), on all matrices of equal shape at once. A
    fused projection is several matrices: `heights` gives, for each parameter, the rows of each."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        heights: list[tuple[int, ...]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.heights = heights

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        (group,) = self.param_groups
        learned = [
            (p, rows) for p, rows in zip(group["params"], self.heights, strict=True) if p.grad is not None
        ]
        if not learned:
            return
        parameters = [p for p, _ in learned]
        directions = self._directions(parameters, group["momentum"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[tuple[int, ...], list[Pair]] = defaultdict(list)
        for (parameter, rows), direction in zip(learned, directions, strict=True):
            for pair in _matrices(parameter, direction, rows):
                by_shape[pair[0].shape].append(pair)
        for shape, pairs in by_shape.items():
            matrices = [matrix for matrix, _ in pairs]
            updates = orthogonalize(torch.stack([direction for _, direction in pairs]))
            rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
            torch._foreach_sub_(matrices, updates.unbind(), alpha=rate)

    def _directions(self, parameters: list[nn.Parameter], momentum: float) -> list[Tensor]:
        """Nesterov momentum of the gradients, in the parameters' shapes [R, C] or [X, R, C]."""
        gradients = [p.grad for p in parameters]
        buffers = []
        for p in parameters:
            state = self.state[p]
            buffers.append(state.setdefault("momentum", torch.zeros_like(p)))
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return torch._foreach_lerp(gradients, buffers, momentum)


def _matrices(parameter: Tensor, direction: Tensor, rows: tuple[int, ...]) -> list[Pair]:
    """The matrices of a parameter with their directions, as views [R, C] with at most as many rows as
    columns."""
    pairs = []
    parts = parameter.flatten(0, -2).split(rows)
    steps = direction.flatten(0, -2).split(rows)
    for matrix, step in zip(parts, steps, strict=True):
        tall = matrix.shape[0] > matrix.shape[1]
        pairs.append((matrix.mT, step.mT) if tall else (matrix, step))
    return pairs


def orthogonalize(matrices_XRC: Tensor, steps: int = 5) -> Tensor:
    """Quintic Newton-Schulz: every singular value of each matrix goes to about 1. At most as many rows as
    columns."""
    a = 3.4445
    b = -4.7750
    c = 2.0315
    x_XRC = matrices_XRC / (matrices_XRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_XRR = x_XRC @ x_XRC.mT
        polynomial_XRR = torch.baddbmm(gram_XRR, gram_XRR, gram_XRR, beta=b, alpha=c)
        x_XRC = torch.baddbmm(x_XRC, polynomial_XRR, x_XRC, beta=a)
    return x_XRC


def _for_muon(name: str, parameter: Tensor) -> bool:
    """True for a matrix [R, C] inside a block, or a stack of experts' [X, R, C]; a router's is AdamW's."""
    return parameter.ndim >= 2 and "block" in name and ".router." not in name


def _adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class Optimizer:
    """The settings' optimizers and learning-rate schedule over a model's parameters.

    Embeddings, vectors and routers are AdamW's also beside Muon. Routed experts may have a learning rate of
    their own."""

    def __init__(self, model: Decoder, settings: Settings, steps: int):
        self.model = model
        self.settings = settings
        self.steps = steps
        self.parts: list[torch.optim.Optimizer] = []
        self.rates: list[float] = []  # of each part, over the settings' learning rate
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        dense = {name: p for name, p in named.items() if "experts_" not in name}
        experts = {name: p for name, p in named.items() if "experts_" in name}
        with_muon = settings.name == "muon" and any(_for_muon(name, p) for name, p in named.items())
        adamw_ratio = settings.adamw_ratio if with_muon else 1.0
        self._add(dense, 1.0, adamw_ratio)
        self._add(experts, settings.expert_ratio, adamw_ratio)

    def _add(self, named: dict[str, nn.Parameter], ratio: float, adamw_ratio: float) -> None:
        """Add the optimizers of some parameters, whose rate is `ratio` times the settings'."""
        settings = self.settings
        muon = [name for name, p in named.items() if settings.name == "muon" and _for_muon(name, p)]
        adamw = [p for name, p in named.items() if name not in muon]
        if adamw:
            self.parts.append(_adamw(adamw, settings))
            self.rates.append(ratio * adamw_ratio)
        if muon:
            heights = [self.model.config.matrices(name) or (len(named[name]),) for name in muon]
            matrices = [named[name] for name in muon]
            self.parts.append(Muon(matrices, heights, settings.learning_rate, settings.weight_decay))
            self.rates.append(ratio)

    def step(self, step: int) -> float:
        """Clip the gradients, update, drop the gradients; returns their norm before clipping.

        If the norm is not finite, nothing changes: neither weights nor moments nor gradients.
        """
        learned = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in learned])
        if not math.isfinite(norm):
            return float(norm)
        nn.utils.clip_grads_with_norm_(learned, self.settings.clip_norm, norm)
        rate = self.settings.learning_rate * schedule(self.settings, step, self.steps)
        for part, ratio in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * ratio
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> list[dict]:
        """The states of all parts, for an exact resume."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Continue from states of `state_dict`."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def schedule(settings: Settings, step: int, steps: int) -> float:
    """The learning rate's factor at `step` of `steps`: warm-up from 0, then constant, linear or cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    if settings.schedule == "constant":
        return 1.0
    shape = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.final_ratio + (1 - settings.final_ratio) * shape
