"""LoRA: low-rank adapters of linear layers, trained in place of weights (Hu et al. 2021, arXiv 2106.09685).

The model computes with merged weights, base + scale * B @ A, in sampling and in training: both read the same
tensors. They are merged from the base's weights after each update, in float32, and rounded once. Only the
backward pass computes with A and B. N tokens · C inputs · O outputs · R rank · S rank x adapted matrices of a
fused weight · P rows of these matrices.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config.parts import LoRA as Settings
from ..types import LimbeckError, generator
from .decoder import Decoder
from .linear import Linear
from .weights import Part, parts


class Matrix(NamedTuple):
    """One adapted matrix of a fused weight: its rows of the weight, its rows of A and its rows of B."""

    part: Part
    rows: slice
    ranks: slice
    ups: slice


class Adapter:
    """The adapters of one linear layer: A [S, C] and B [P, R] in float32, and the base's weight [O, C].

    The matrices of a fused weight, such as queries, keys and values, have adapters of their own, which are
    stacked in A and B. `scale` is alpha / rank. B is zero at first, so the merged weight is the base's.
    """

    def __init__(self, layer: Linear, adapted: list[Part], settings: Settings, seed: object):
        weight = layer.weight
        precision = torch.promote_types(weight.dtype, torch.float32)
        drawn = [_drawn(part, weight, settings.rank, seed) for part in adapted]
        heights = [part.end - part.begin for part in adapted]
        self.rank = settings.rank
        self.scale = settings.alpha / settings.rank
        self.base_OC = weight.detach().clone()
        self.a_SC = nn.Parameter(torch.cat(drawn).to(weight.device, precision))
        self.b_PR = nn.Parameter(weight.new_zeros(sum(heights), settings.rank, dtype=precision))
        self.matrices = []
        for i, (part, (begin, end)) in enumerate(
            zip(adapted, pairwise(accumulate(heights, initial=0)), strict=True)
        ):
            ranks = slice(i * self.rank, (i + 1) * self.rank)
            self.matrices.append(Matrix(part, slice(part.begin, part.end), ranks, slice(begin, end)))

    @torch.no_grad()
    def merge(self, weight_OC: Tensor) -> None:
        """Write base + scale * B @ A into the layer's weight, in place; other rows stay as they are."""
        for _, rows, ranks, ups in self.matrices:
            base = self.base_OC[rows].to(self.a_SC.dtype)
            weight_OC[rows] = torch.addmm(base, self.b_PR[ups], self.a_SC[ranks], alpha=self.scale)


class AdaptedLinear(Linear):
    """A linear layer whose weight is merged and whose gradients go to its adapters."""

    adapter: Adapter

    def forward(self, x_NC: Tensor) -> Tensor:
        """Return the output of the layer, [N, O]."""
        if not torch.is_grad_enabled():
            return super().forward(x_NC)
        return _Product.apply(x_NC, self.adapter.a_SC, self.adapter.b_PR, self.weight, self)


class _Product(torch.autograd.Function):
    """The product with a merged weight, with gradients by the input, A and B, but none by the weight."""

    @staticmethod
    def forward(ctx, x_NC, a_SC, b_PR, weight_OC, layer):
        """Return the output of the layer, [N, O]."""
        ctx.save_for_backward(x_NC, a_SC, b_PR, weight_OC)
        ctx.adapter = layer.adapter
        return layer.ops.linear(x_NC, weight_OC, layer.bias)

    @staticmethod
    def backward(ctx, grad_NO):
        """Return the gradients by x [N, C], A [S, C] and B [P, R].

        With s = scale: scale * (grad @ B).T @ x for A, scale * grad.T @ (x @ A.T) for B.
        """
        x_NC, a_SC, b_PR, weight_OC = ctx.saved_tensors
        adapter = ctx.adapter
        b_PR = b_PR.to(x_NC.dtype)
        reduced_NS = x_NC @ a_SC.to(x_NC.dtype).T
        by_reduced_NS = torch.empty_like(reduced_NS)
        by_b_PR = torch.empty_like(b_PR)
        for _, rows, ranks, ups in adapter.matrices:
            grad_NP = grad_NO[:, rows]
            torch.mm(grad_NP.T, reduced_NS[:, ranks], out=by_b_PR[ups])
            by_reduced_NS[:, ranks] = grad_NP @ b_PR[ups]
        by_a_SC = (by_reduced_NS.T @ x_NC).to(a_SC.dtype).mul_(adapter.scale)
        by_x_NC = grad_NO @ weight_OC if ctx.needs_input_grad[0] else None
        return by_x_NC, by_a_SC, by_b_PR.to(a_SC.dtype).mul_(adapter.scale), None, None


class LoRA:
    """The adapters of a decoder, which this attaches to the layers that the settings name.

    All weights of the decoder are frozen, in place. Their names stay, and so do their places in memory: a
    merged weight is written where the layer's weight was. Attach adapters after the model is on its device.
    `seed` determines the initial A.

    Raises:
        LimbeckError: the settings name a layer that the model does not have, or the rank is larger than a
            layer.
    """

    def __init__(self, model: Decoder, settings: Settings, seed: object):
        self.model = model
        self.settings = settings
        self.layers: dict[str, AdaptedLinear] = {}
        chosen = _chosen(model, settings.names)
        for part in (part for adapted in chosen.values() for part in adapted):
            _check_rank(model, part, settings.rank)
        model.requires_grad_(False)
        for name, adapted in chosen.items():
            layer = model.get_submodule(name)
            layer.adapter = Adapter(layer, adapted, settings, seed)
            layer.__class__ = AdaptedLinear
            self.layers[name] = layer

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return A [S, C] and B [P, R] of all layers, by names such as `blocks.0.ffn.down.lora_A`."""
        named = {}
        for name, layer in self.layers.items():
            named[f"{name}.lora_A"] = layer.adapter.a_SC
            named[f"{name}.lora_B"] = layer.adapter.b_PR
        return named

    def merge(self) -> None:
        """Write the merged weights of all layers, from the base's weights and the present A and B."""
        for layer in self.layers.values():
            layer.adapter.merge(layer.weight)

    def matrices(self) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """Yield every adapted matrix: where it is stored, its A [R, C] and its B [P, R]."""
        for layer in self.layers.values():
            adapter = layer.adapter
            for part, _, ranks, ups in adapter.matrices:
                yield part, adapter.a_SC.detach()[ranks], adapter.b_PR.detach()[ups]

    def base(self) -> Decoder:
        """Return the base as a decoder that shares its weights with this one: only its modules are new."""
        shared: dict[int, object] = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        for module in self.model.modules():
            if hasattr(module, "ops"):
                shared[id(module.ops)] = module.ops
        for layer in self.layers.values():
            shared[id(layer.weight)] = nn.Parameter(layer.adapter.base_OC, requires_grad=False)
            shared[id(layer.adapter)] = None
        base = copy.deepcopy(self.model, shared)
        for name in self.layers:
            base.get_submodule(name).__class__ = Linear
        return base


def targets_of(model: Decoder) -> dict[str, list[tuple[str, Part]]]:
    """Return the linear layers that can be adapted, by the short names of settings, such as `q` or `down`.

    A layer is given as the name of our module, which may hold several, and its part of the weight.
    Embeddings, the head and modules of multi-token prediction are not among them. Neither are feed-forward
    layers of a model with experts, whose names PEFT takes to mean the routed experts.
    """
    skipped = ("ahead.", "ffn") if model.config.experts else ("ahead.",)
    found: dict[str, list[tuple[str, Part]]] = defaultdict(list)
    for part in parts(model):
        module, _, kind = part.ours.rpartition(".")
        outside = re.sub(r"^blocks\.\d+\.", "", module).startswith(skipped)
        if kind == "weight" and not outside and isinstance(model.get_submodule(module), Linear):
            found[_short(part.theirs.removesuffix(".weight"))].append((module, part))
    return found


def _short(name: str) -> str:
    """Return the short name of a HuggingFace module.

    >>> _short("model.layers.3.self_attn.q_proj")
    'q'
    """
    return name.rpartition(".")[2].removesuffix("_proj")


def _chosen(model: Decoder, names: tuple[str, ...]) -> dict[str, list[Part]]:
    """Return the parts to adapt of each of our modules, by the module's name."""
    found = targets_of(model)
    names = tuple(found) if "all" in names else names
    for name in names:
        if name not in found:
            raise LimbeckError(
                f"lora.targets: {name} is no linear layer of this model; "
                f"name some of {', '.join(found)}, or all"
            )
    chosen: dict[str, list[Part]] = defaultdict(list)
    for name in found:  # in the model's order, whatever the order of the settings
        for module, part in found[name] if name in names else ():
            chosen[module].append(part)
    return chosen


def _check_rank(model: Decoder, part: Part, rank: int) -> None:
    """Refuse a rank that is larger than a side of the matrix to adapt."""
    inputs = model.get_parameter(part.ours).shape[1]
    outputs = part.end - part.begin
    if rank > min(inputs, outputs):
        name = part.theirs.removesuffix(".weight")
        raise LimbeckError(
            f"lora.rank = {rank} is more than {name} has, which is {outputs} x {inputs}; "
            f"give at most {min(inputs, outputs)}, or leave {_short(name)} out of lora.targets"
        )


def _drawn(part: Part, weight_OC: Tensor, rank: int, seed: object) -> Tensor:
    """Return the initial A [R, C] of one matrix: uniform, with a bound of 1 / sqrt(C) as PEFT has it."""
    inputs = weight_OC.shape[1]
    bound = inputs**-0.5
    drawn = generator(seed, "lora", part.theirs).uniform(-bound, bound, (rank, inputs))
    return torch.from_numpy(drawn)
