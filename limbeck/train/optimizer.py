"""AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from ..config.parts import Optimizer as Settings
from ..model.decoder import Decoder


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan 2024); the update is scaled by 0.2 sqrt(larger side), so that one
    learning rate fits Muon and AdamW (Liu et al. 2025, arXiv 2502.16982, eq. 4).

    Newton-Schulz runs in float32 (bfloat16 is slow on most CPUs), on all equal shapes at once, and on each
    matrix of a fused product by itself: `heights` says, per parameter, how many rows each has.
    """

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
        (group,) = self.param_groups
        learned = [
            (p, rows) for p, rows in zip(group["params"], self.heights, strict=True) if p.grad is not None
        ]
        if not learned:
            return
        parameters, gradients = [p for p, _ in learned], [p.grad for p, _ in learned]
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        wanted = torch._foreach_lerp(gradients, buffers, group["momentum"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, direction, (_, rows) in zip(parameters, wanted, learned, strict=True):
            for pair in zip(
                *(tensor.flatten(0, -2).split(rows) for tensor in (parameter, direction)), strict=True
            ):
                wide = pair if pair[0].shape[0] <= pair[0].shape[1] else [tensor.mT for tensor in pair]
                alike[wide[0].shape].append(tuple(wide))
        for shape, pairs in alike.items():
            matrices, directions = zip(*pairs, strict=True)
            updates = orthogonalize(torch.stack(directions))
            torch._foreach_sub_(matrices, updates.unbind(), alpha=0.2 * math.sqrt(max(shape)) * group["lr"])


def orthogonalize(matrices_XRC: Tensor, steps: int = 5) -> Tensor:
    """Quintic Newton-Schulz: every singular value of each matrix goes to about 1; rows R at most columns C."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices_XRC / (matrices_XRC.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _orthogonal(name: str, parameter: Tensor) -> bool:
    """Matrices inside the blocks, stacks of experts' among them; a router chooses, it does not mix."""
    return parameter.ndim >= 2 and "block" in name and ".router." not in name


def _adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    decayed = {"params": [p for p in parameters if p.ndim >= 2]}
    vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW(
        [group for group in (decayed, vectors) if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def expert_ratio(batch: float, noise: float, experts: int) -> float:
    """Hunyuan-Large's rate of a routed expert over the rate of the rest (arXiv 2411.02265, section 2.2.4): the best
    rate for `batch` tokens is 2 / (sqrt(noise / batch) + sqrt(batch / noise)) of the highest, and an expert sees
    batch / experts of them. The paper states 0.31 for 16 experts, which its formula gives for a batch of 0.26
    `noise`; for one of 61 `noise` the formula gives 3.2, the inverse."""

    def best(tokens: float) -> float:
        return 2 / ((noise / tokens) ** 0.5 + (tokens / noise) ** 0.5)

    return best(batch / experts) / best(batch)


class Optimizer:
    """The settings' optimiser and schedule over a model's parameters; `step(i)` is told which step it is.

    Routers and embeddings are AdamW's also beside Muon. Routed experts may learn at a rate of their own.
    """

    def __init__(self, model: Decoder, settings: Settings, steps: int):
        self.model, self.settings, self.steps = model, settings, steps
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        muons = [n for n, p in learned.items() if settings.name == "muon" and _orthogonal(n, p)]
        adams = [n for n in learned if n not in muons]
        self.parts, self.rates = [], []
        for experts in (False, True):
            ratio = settings.expert_ratio if experts else 1.0
            inner = [n for n in muons if ("experts_" in n) == experts]
            outer = [n for n in adams if ("experts_" in n) == experts]
            if outer:
                self.parts.append(_adamw([learned[n] for n in outer], settings))
                self.rates.append(ratio * (settings.adamw_ratio if muons else 1.0))
            if inner:
                heights = [model.config.matrices(n) or (len(learned[n]),) for n in inner]
                tall = [learned[n] for n in inner]
                self.parts.append(Muon(tall, heights, settings.learning_rate, settings.weight_decay))
                self.rates.append(ratio)

    def step(self, step: int) -> float:
        """Clip, update, forget the gradients; returns the gradient's norm before clipping. Where that is not finite,
        nothing is touched: neither weights nor moments nor gradients."""
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
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
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
