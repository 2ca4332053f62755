"""The forms in which llama.cpp stores tensors, and their way back: same numbers, other rows, stacks and
halves.

`pack` and `unpack` also take tensors of the device `meta`, and so give shapes without reading anything.
H heads · D rows of a head · R latent rank · E experts · X rows of a matrix · Y its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .families import FULL_QUERIES, KEYS_VALUES, LOW_RANK_QUERIES, OUTER, Family, Names

# Tensors whose rows llama.cpp reorders, and the number of their heads in config.json.
ROTATED = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}

Tensors = Sequence[Tensor]


class Form(Protocol):
    """The relation of tensors of HuggingFace, [X, Y] each, to those of a GGUF file."""

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """Tensors of a GGUF file, from HuggingFace's [X, Y]."""
        ...

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """HuggingFace's tensors [X, Y], from those of a GGUF file."""
        ...


@dataclass(frozen=True)
class Same:
    """Tensors that are the same in both: `Same()`."""

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """The same tensors [X, Y]."""
        return list(tensors)

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """The same tensors [X, Y]."""
        return list(tensors)


@dataclass(frozen=True)
class Interleaved:
    """Query and key rows of Llama: `Interleaved(heads=9)`.

    llama.cpp rotates neighbouring dimensions together, transformers those of both halves.
    """

    heads: int

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """Rows [X, Y] with both halves of each head interleaved."""
        return [self._reorder(tensor, 2, -1) for tensor in tensors]

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """Rows [X, Y] with both halves of each head one after the other."""
        return [self._reorder(tensor, -1, 2) for tensor in tensors]

    def _reorder(self, tensor_XY: Tensor, first: int, second: int) -> Tensor:
        """Rows [X, Y], each head's cut into `first` x `second` and transposed."""
        heads = tensor_XY.reshape(self.heads, first, second, *tensor_XY.shape[1:])
        return heads.transpose(1, 2).reshape(tensor_XY.shape)


@dataclass(frozen=True)
class Stacked:
    """The matrices of all experts of a layer as one, expert first: `Stacked()`."""

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """One tensor [E, X, Y] of the experts' matrices [X, Y]."""
        return [torch.stack(list(tensors))]

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """The experts' matrices [X, Y] of one tensor [E, X, Y]."""
        (stack_EXY,) = tensors
        return [expert_XY.clone() for expert_XY in stack_EXY]


@dataclass(frozen=True)
class Latent:
    """The matrix that widens MLA's latent: `Latent(heads=16, nope=128)`, `nope` rows of a head for its key.

    One matrix of `heads * (nope + value)` rows becomes the keys, transposed for absorption into the query
    [H, R, D], and the values [H, D, R]. DeepSeek-V2, arXiv:2405.04434, appendix C.
    """

    heads: int
    nope: int

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """Keys [H, R, D] and values [H, D, R] of one matrix [X, R]."""
        (rows_XR,) = tensors
        rows_HDR = rows_XR.reshape(self.heads, -1, rows_XR.shape[-1])
        keys_HRD = rows_HDR[:, : self.nope].transpose(1, 2)
        values_HDR = rows_HDR[:, self.nope :]
        return [keys_HRD.contiguous(), values_HDR.contiguous()]

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """One matrix [X, R] of keys [H, R, D] and values [H, D, R]."""
        keys_HRD, values_HDR = tensors
        rows_HDR = torch.cat([keys_HRD.transpose(1, 2), values_HDR], dim=1)
        return [rows_HDR.flatten(0, 1)]


@dataclass(frozen=True)
class Link:
    """Tensors of a GGUF file and those of a HuggingFace directory that hold the same numbers.

    `Link(("blk.0.attn_q.weight",), ("model.layers.0.self_attn.q_proj.weight",), Interleaved(9))`
    """

    ggml: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = Same()


def links(family: Family, tree: dict[str, Any]) -> Iterator[Link]:
    """Every tensor that a model of this family with this `config.json` has, and no other."""
    for ours, theirs in OUTER.items():
        if ours != "output.weight" or not tree["tie_word_embeddings"]:
            yield Link((ours,), (theirs,))
    dense = _dense_layers(family, tree)
    for layer in range(tree["num_hidden_layers"]):
        if family.latent:
            ours, theirs = KEYS_VALUES
            form = Latent(tree["num_attention_heads"], tree["qk_nope_head_dim"])
            yield _in_layer(layer, ours, (theirs,), form)
        for ours, theirs in _names(family, tree, layer < dense).items():
            sources = _each_expert(theirs, tree)
            yield _in_layer(layer, (ours,), sources, _form(family, ours, theirs, tree))


def _dense_layers(family: Family, tree: dict[str, Any]) -> int:
    """The number of layers with a dense feed-forward, which come first."""
    if family.latent:
        return tree["first_k_dense_replace"]
    return 0 if family.sparse else tree["num_hidden_layers"]


def _names(family: Family, tree: dict[str, Any], dense: bool) -> Names:
    """The tensors of a layer, by both names."""
    names = {**family.layer, **(family.dense if dense else family.sparse)}
    if family.latent:
        names |= LOW_RANK_QUERIES if tree.get("q_lora_rank") else FULL_QUERIES
    return names


def _in_layer(layer: int, ours: Sequence[str], theirs: Sequence[str], form: Form) -> Link:
    """A link of tensors that are named without their layer."""
    ggml = tuple(f"blk.{layer}.{name}" for name in ours)
    return Link(ggml, tuple(f"model.layers.{layer}.{name}" for name in theirs), form)


def _each_expert(theirs: str, tree: dict[str, Any]) -> list[str]:
    """The name for every expert, or the one name."""
    if "{}" not in theirs:
        return [theirs]
    experts = tree.get("num_experts") or tree["n_routed_experts"]
    return [theirs.format(expert) for expert in range(experts)]


def _form(family: Family, ours: str, theirs: str, tree: dict[str, Any]) -> Form:
    """The form of a tensor."""
    if "{}" in theirs:
        return Stacked()
    if family.interleaved and ours in ROTATED:
        return Interleaved(tree[ROTATED[ours]])
    return Same()
