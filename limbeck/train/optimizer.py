"""The optimizers: AdamW for all parameters, or Muon for the weight matrices inside the decoder's blocks and
AdamW for the rest.

Dimensions: X matrices · R rows of a matrix · C columns of a matrix."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..config.parts import Optimizer as Settings
from ..model.decoder import Decoder
from ..model.ops.plain import HALF

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
        """Update the momentum of each parameter and return the Nesterov directions, in the parameters'
        shapes [R, C] or [X, R, C]."""
        gradients = [p.grad for p in parameters]
        buffers = []
        for p in parameters:
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


def _for_muon(name: str, parameter: Tensor) -> bool:
    """Return True if Muon updates the parameter: a matrix [R, C] inside a block, or the stacked matrices of
    experts [X, R, C], but not a router's matrix."""
    return parameter.ndim >= 2 and "block" in name and ".router." not in name


def _adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """Make an AdamW optimizer that applies weight decay to matrices but not to vectors."""
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


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that are not frozen, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Masters:
    """Copies of a model's parameters in float32, which the optimizers update in place of weights in 16 bits.

    The gradients of a single micro-batch stay with the weights, in 16 bits, until the update. From the second
    micro-batch on, gradients are summed in float32: as soon as a backward pass has the whole gradient of a
    parameter, it is added to that of its copy and dropped. `release` rounds the copies into the weights, in
    place. The weights refer to their copies weakly, so that masters that are dropped free their memory.
    """

    def __init__(self, model: nn.Module):
        self.weights = _learned(model)
        self.copies = {name: nn.Parameter(p.detach().float()) for name, p in self.weights.items()}
        self.micro_batches = 0
        masters = weakref.ref(self)
        for name, weight in self.weights.items():
            weight.register_post_accumulate_grad_hook(_summing_hook(masters, name))

    def begin_micro_batch(self) -> None:
        """Say that a backward pass comes: its gradients are added to those of earlier ones in float32."""
        self.micro_batches += 1
        if self.micro_batches == 2:
            self.collect()

    def collect(self) -> None:
        """Move the gradients of all weights to the copies."""
        for name in self.weights:
            self.move_gradient(name)

    @torch.no_grad()
    def move_gradient(self, name: str) -> None:
        """Add the gradient of a weight to that of its copy in float32, and drop it."""
        weight = self.weights[name]
        copy = self.copies[name]
        if weight.grad is None:
            return
        if copy.grad is None:
            copy.grad = weight.grad.float()
        else:
            copy.grad += weight.grad
        weight.grad = None

    def drop_gradients(self) -> None:
        """Drop all gradients since the last update."""
        for parameter in (*self.weights.values(), *self.copies.values()):
            parameter.grad = None
        self.micro_batches = 0

    @torch.no_grad()
    def load(self, copies: dict[str, Tensor]) -> None:
        """Restore the copies that an exact resume needs."""
        for name, copy in self.copies.items():
            copy.copy_(copies[name])

    @torch.no_grad()
    def release(self) -> None:
        """Round the copies into the model's weights."""
        torch._foreach_copy_(list(self.weights.values()), list(self.copies.values()))
        self.micro_batches = 0


def _summing_hook(masters: weakref.ref[Masters], name: str) -> Callable[[Tensor], None]:
    """Return a function that adds a weight's new gradient to that of its copy, where these are summed."""

    def add(weight: Tensor) -> None:
        alive = masters()
        if alive is not None and alive.micro_batches > 1:
            alive.move_gradient(name)

    return add


class Optimizer:
    """The optimizers and the learning-rate schedule that the settings name, over the parameters of a model.

    With Muon, AdamW still updates the embeddings, the vectors and the routers. Routed experts may have a
    learning rate of their own. `steps` is the number of updates planned, which the schedule depends on.
    `adapters` are parameters beside the model's, in float32 (model/lora.py)."""

    def __init__(
        self,
        model: Decoder,
        settings: Settings,
        steps: int,
        adapters: Mapping[str, nn.Parameter] | None = None,
    ):
        self.model = model
        self.settings = settings
        self.steps = steps
        self.parts: list[torch.optim.Optimizer] = []
        self.rates: list[float] = []  # each part's learning rate, divided by the settings'
        learned = _learned(model)
        half = bool(learned) and model.embed.weight.dtype in HALF
        self.masters = Masters(model) if half else None
        self.adapters = dict(adapters or {})
        self.named = named = {**(self.masters.copies if self.masters else learned), **self.adapters}
        dense = {name: p for name, p in named.items() if "experts_" not in name}
        experts = {name: p for name, p in named.items() if "experts_" in name}
        with_muon = settings.name == "muon" and any(_for_muon(name, p) for name, p in named.items())
        adamw_ratio = settings.adamw_ratio if with_muon else 1.0
        self._add(dense, 1.0, adamw_ratio)
        self._add(experts, settings.expert_ratio, adamw_ratio)

    def _add(self, named: dict[str, nn.Parameter], ratio: float, adamw_ratio: float) -> None:
        """Add the optimizers of the parameters `named`. Their learning rate is `ratio` times that of the
        settings; parameters that AdamW updates have it multiplied by `adamw_ratio` as well."""
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

    def begin_micro_batch(self) -> None:
        """Say that a backward pass comes, whose gradients are to be added to those of earlier ones."""
        if self.masters:
            self.masters.begin_micro_batch()

    def drop_gradients(self) -> None:
        """Drop all gradients since the last update."""
        self.model.zero_grad(set_to_none=True)
        for adapter in self.adapters.values():
            adapter.grad = None
        if self.masters:
            self.masters.drop_gradients()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the gradient of each parameter that has one."""
        for name, parameter in self.named.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def step(self, step: int) -> float:
        """Clip the gradients, update the parameters, and drop the gradients; return the norm of the
        gradients before clipping.

        `step` is the number of the update, from 0. If the norm is not finite, weights, moments and gradients
        stay as they are."""
        if self.masters:
            self.masters.collect()
        learned = [p for p in self.named.values() if p.grad is not None]
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
        if self.masters:
            self.masters.release()
        return float(norm)

    def state_dict(self) -> list[dict]:
        """Return the states of all optimizers, for an exact resume."""
        states = [part.state_dict() for part in self.parts]
        if self.masters:
            states.append({"masters": {name: copy.detach() for name, copy in self.masters.copies.items()}})
        return states

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore the states that `state_dict` returned."""
        for part, state in zip(self.parts, states, strict=self.masters is None):
            part.load_state_dict(state)
        if self.masters:
            self.masters.load(states[-1]["masters"])


def schedule(settings: Settings, step: int, steps: int) -> float:
    """Return the factor of the learning rate at update `step` of `steps`: a linear warm-up to 1, then the
    schedule of the settings (constant, linear or cosine), which decays to `final_ratio`."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    if settings.schedule == "constant":
        return 1.0
    shape = 1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.final_ratio + (1 - settings.final_ratio) * shape
