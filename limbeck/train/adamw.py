"""AdamW, a few million numbers at a time: what is not kept in float32 is never in float32 as a whole.

N numbers of a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..config.parts import Optimizer as Settings
from ..model.ops import devices
from . import moments
from .masters import HOST, Learned
from .rounding import Noise, round_stochastically

CHUNK = 1 << 22  # numbers that are updated at once: 16 MiB in float32


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), with weight decay of matrices but not of vectors.

    Chunks are updated in float32 by torch's fused kernel. The moments may be in 8 bits between updates
    (moments.py). A master is rounded into its weight; a weight in bfloat16 that has none is rounded
    stochastically (rounding.py). With `offload`, masters and moments are in the host's memory: gradients come
    there and new weights go from there."""

    def __init__(self, learned: list[Learned], settings: Settings, seed: object = 0):
        matrices = [tensor.master for tensor in learned if tensor.weight.ndim >= 2]
        vectors = [tensor.master for tensor in learned if tensor.weight.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        defaults = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)
        self.settings = settings
        self.seed = seed
        self.learned = {tensor.master: tensor for tensor in learned}
        self.buffers = Buffers()

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], scale: Tensor, step: int) -> None:
        """Update every tensor that has a gradient. `gradients` are by name, in 16 bits or more, and are
        multiplied by `scale`; `step` is the number of the update, which random rounding depends on."""
        beta1, beta2 = self.settings.betas
        fixed = {"beta1": beta1, "beta2": beta2, "eps": 1e-8, "amsgrad": False, "maximize": False}
        for group in self.param_groups:
            options = {**fixed, "lr": group["lr"], "weight_decay": group["weight_decay"]}
            for master in group["params"]:
                tensor = self.learned[master]
                gradient = gradients.get(tensor.name)
                if gradient is not None:
                    self._update(tensor, gradient, scale, options, Noise(self.seed, step, tensor.name))

    def _update(
        self, tensor: Learned, gradient: Tensor, scale: Tensor, options: dict[str, Any], noise: Noise
    ) -> None:
        """Update a tensor. `options` are those of torch's kernel."""
        _, weight, master = tensor
        state = self.state[master]
        if not state:
            state.update(moments.begin(weight, self._device(weight), self.settings.moments))
        state["step"] += 1
        scale = scale.to(state["step"].device)
        gradient_N = gradient.reshape(-1)
        for part in _chunks(weight.numel()):
            target_N = weight.view(-1)[part]
            first_N, second_N = moments.read(state, part)
            source_N = target_N if master is weight else master.view(-1)[part]
            numbers_N = self._fetch(source_N, first_N)
            scaled_N = self._fetch(gradient_N[part], first_N) * scale
            torch._fused_adamw_(
                [numbers_N], [scaled_N], [first_N], [second_N], [], [state["step"]], **options
            )
            moments.write(state, part, first_N, second_N, noise)
            if master is weight and target_N.dtype == torch.bfloat16:
                numbers_N = round_stochastically(numbers_N, noise.bits("weight", part.start, numbers_N))
            if numbers_N is not target_N:
                self.buffers.send(numbers_N, target_N)

    def missing_bytes(self) -> int:
        """Return the bytes on the weights' device of the moments that are not there yet."""
        if self.settings.offload:
            return 0
        missing = [one.weight for master, one in self.learned.items() if not self.state.get(master)]
        states = [moments.begin(weight, torch.device("meta"), self.settings.moments) for weight in missing]
        return sum(tensor.nbytes for state in states for tensor in state.values())

    def _device(self, weight: Tensor) -> torch.device:
        """Return the device that a weight is updated on."""
        return HOST if self.settings.offload else weight.device

    def _fetch(self, chunk_N: Tensor, like_N: Tensor) -> Tensor:
        """Return a chunk [N] on the device and in the type of `like_N`; the chunk itself if it is so."""
        if chunk_N.device != like_N.device:
            chunk_N = self.buffers.fetch(chunk_N)
        return chunk_N.to(like_N.dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moments and learning rates that `state_dict` returned. Moments keep the types that they
        were saved in: torch's own function would give them the type of the parameter."""
        masters = [master for group in self.param_groups for master in group["params"]]
        for index, state in state_dict["state"].items():
            device = self._device(self.learned[masters[index]].weight)
            self.state[masters[index]] = {name: value.to(device) for name, value in state.items()}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["lr"] = saved["lr"]


def _chunks(count: int) -> Iterator[slice]:
    """Yield the chunks of a tensor of `count` numbers."""
    for begin in range(0, count, CHUNK):
        yield slice(begin, min(count, begin + CHUNK))


class Buffers:
    """Memory of the host for one chunk of each type, which numbers pass through from a device and to it. For
    a card it is pinned: the card copies from there and to there by itself."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}

    def fetch(self, chunk_N: Tensor) -> Tensor:
        """Return a chunk [N] of a device in the host's memory, where it stays until the next one."""
        return self._buffer(chunk_N).copy_(chunk_N)

    def send(self, numbers_N: Tensor, target_N: Tensor) -> None:
        """Write numbers [N] into a chunk of a weight, in place, rounded to its type."""
        if numbers_N.device != target_N.device:
            numbers_N = self._buffer(target_N).copy_(numbers_N)
        target_N.copy_(numbers_N)

    def _buffer(self, chunk_N: Tensor) -> Tensor:
        """Return the buffer for a chunk [N] of a device."""
        if chunk_N.dtype not in self._buffers:
            self._buffers[chunk_N.dtype] = devices.host_buffer(CHUNK, chunk_N.dtype, chunk_N.device)
        return self._buffers[chunk_N.dtype][: len(chunk_N)]
