"""The optimizer of a model: AdamW for all parameters, or Muon for the weight matrices inside the decoder's
blocks and AdamW for the rest; gradient clipping and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..config.parts import Optimizer as Settings
from ..model.decoder import Decoder
from ..model.ops.plain import HALF
from ..types import LimbeckError
from .adamw import AdamW
from .masters import HOST, GradientSums, Learned, copy_masters
from .muon import Muon, for_muon


class Optimizer:
    """The optimizers and the learning-rate schedule that the settings name, over the parameters of a model.

    With Muon, AdamW still updates the embeddings, the vectors and the routers. Routed experts may have a
    learning rate of their own. Weights in 16 bits have masters in float32, unless the settings want none.
    `steps` is the number of updates planned, which the schedule depends on. `adapters` are parameters beside
    the model's, in float32 (model/lora.py). `seed` determines stochastic rounding.

    Raises:
        LimbeckError: the settings want no masters, and there are no weights in bfloat16 that learn.
    """

    def __init__(
        self,
        model: Decoder,
        settings: Settings,
        steps: int,
        adapters: Mapping[str, nn.Parameter] | None = None,
        seed: object = 0,
    ):
        self.model = model
        self.settings = settings
        self.steps = steps
        self.seed = seed
        self.parts: list[AdamW | Muon] = []
        self.rates: list[float] = []  # each part's learning rate, divided by the settings'
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, nn.Parameter] = {**learned, **(adapters or {})}
        half = {name: p for name, p in self.weights.items() if p.dtype in HALF}
        device = HOST if settings.offload else None
        self.masters: dict[str, nn.Parameter] = {}
        if settings.masters is False:
            _check_bfloat16(self.weights)
        else:
            self.masters = copy_masters(self.weights if settings.offload else half, device)
        self.sums = GradientSums(half, device)
        self._add_parts()

    def _add_parts(self) -> None:
        """Add the optimizers of all parameters."""
        dense: dict[str, nn.Parameter] = {}
        experts: dict[str, nn.Parameter] = {}
        for name, p in self.weights.items():
            (experts if "experts_" in name else dense)[name] = p
        muon = self.settings.name == "muon" and any(for_muon(name, p) for name, p in self.weights.items())
        adamw_ratio = self.settings.adamw_ratio if muon else 1.0
        self._add(dense, 1.0, adamw_ratio)
        self._add(experts, self.settings.expert_ratio, adamw_ratio)

    def _add(self, weights: dict[str, nn.Parameter], ratio: float, adamw_ratio: float) -> None:
        """Add the optimizers of some parameters. Their learning rate is `ratio` times that of the settings;
        parameters that AdamW updates have it multiplied by `adamw_ratio` as well."""
        settings = self.settings
        learned = [Learned(name, p, self.masters.get(name, p)) for name, p in weights.items()]
        muon = [one for one in learned if settings.name == "muon" and for_muon(one.name, one.weight)]
        adamw = [one for one in learned if one not in muon]
        if adamw:
            self.parts.append(AdamW(adamw, settings, self.seed))
            self.rates.append(ratio * adamw_ratio)
        if muon:
            heights = [self.model.config.matrices(one.name) or (len(one.weight),) for one in muon]
            self.parts.append(Muon(muon, heights, settings.learning_rate, settings.weight_decay))
            self.rates.append(ratio)

    def begin_micro_batch(self) -> None:
        """Say that a backward pass comes, whose gradients are to be added to those of earlier ones."""
        self.sums.begin_micro_batch()

    def missing_bytes(self) -> int:
        """Return the bytes on the model's device that the moments and the gradients of an update will take,
        beside those of moments that are there."""
        missing = sum(part.missing_bytes() for part in self.parts)
        for weight in self.weights.values():
            wide = 4 if weight.dtype in HALF and not self.settings.offload else weight.element_size()
            missing += wide * weight.numel()
        return missing

    def drop_gradients(self) -> None:
        """Drop all gradients since the last update."""
        self.model.zero_grad(set_to_none=True)
        for weight in self.weights.values():
            weight.grad = None
        self.sums.drop()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the gradient of each parameter that has one."""
        for name, weight in self.weights.items():
            gradient = self.sums.sums.get(name, weight.grad)
            if gradient is not None:
                yield name, gradient

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Clip the gradients, update the parameters, and drop the gradients; return the norm of the
        gradients before clipping.

        `step` is the number of the update, from 0. If the norm is not finite, weights, moments and gradients
        stay as they are."""
        gradients = dict(self.gradients())
        norm = total_norm(gradients.values())
        if not math.isfinite(norm):
            return float(norm)
        scale = torch.clamp(self.settings.clip_norm / (norm + 1e-6), max=1.0)
        rate = self.settings.learning_rate * schedule(self.settings, step, self.steps)
        for part, ratio in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * ratio
            part.step(gradients, scale, step)
        self.drop_gradients()
        return float(norm)

    def state_dict(self) -> list[dict]:
        """Return the states of all optimizers and the masters of weights in 16 bits, for an exact resume."""
        states = [part.state_dict() for part in self.parts]
        masters = {name: p.detach() for name, p in self.masters.items() if self.weights[name].dtype in HALF}
        return [*states, {"masters": masters}] if masters else states

    @torch.no_grad()
    def load_state_dict(self, states: list[dict]) -> None:
        """Restore the states that `state_dict` returned. The model's weights are restored before."""
        for part, state in zip(self.parts, states, strict=False):
            part.load_state_dict(state)
        saved = states[-1].get("masters", {})
        for name, master in self.masters.items():
            master.copy_(saved.get(name, self.weights[name]))


def _check_bfloat16(weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse to learn without masters where weights are not in bfloat16, which updates are rounded into."""
    for name, weight in weights.items():
        if weight.dtype != torch.bfloat16:
            kind = str(weight.dtype).removeprefix("torch.")
            raise LimbeckError(
                f"optimizer.masters: false rounds updates into weights in bfloat16, but {name} is in {kind}; "
                "set precision: bfloat16 and learn without adapters, or leave masters out"
            )


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients as one vector, computed in float32 or better on the device of each."""
    gradients = list(gradients)
    if not gradients:
        return torch.zeros(())
    norms = []
    for gradient in gradients:
        precision = torch.promote_types(gradient.dtype, torch.float32)
        norms += torch._foreach_norm([gradient], 2, precision)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


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
