"""The layouts in which llama.cpp stores tensors, and the conversions from and to HuggingFace's layouts.

The numbers are the same, but rows can be in another order, and matrices stacked or split. `pack` and `unpack`
also take tensors on torch's device `meta`, and then give the shapes of the results without any data. H heads
· D rows of a head · R latent rank · E experts · X rows of a matrix · Y its columns.
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
    """The conversion between HuggingFace's tensors, [X, Y] each, and a GGUF file's with the same numbers."""

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """Return the tensors of a GGUF file, made from HuggingFace's tensors [X, Y]."""
        ...

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """Return HuggingFace's tensors [X, Y], made from the tensors of a GGUF file."""
        ...


@dataclass(frozen=True)
class Same:
    """The conversion of tensors that are equal in both formats."""

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """Return the same tensors, [X, Y] each."""
        return list(tensors)

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """Return the same tensors, [X, Y] each."""
        return list(tensors)


@dataclass(frozen=True)
class FromOne:
    """The conversion of the weights of norms that HuggingFace stores less one."""

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """Return the weights [X] of a GGUF file."""
        return [tensor.float() + 1 for tensor in tensors]

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """Return HuggingFace's weights [X]."""
        return [tensor - 1 for tensor in tensors]


@dataclass(frozen=True)
class Interleaved:
    """The conversion of Llama's projections of queries and keys, for example `Interleaved(heads=9)`.

    llama.cpp rotates neighbouring dimensions of a head together, transformers dimension i of the first half
    with dimension i of the second half; so the rows of each head have different orders.
    """

    heads: int

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """Return the tensors [X, Y] with the rows of each head's two halves interleaved, as in GGUF."""
        return [self._reorder(tensor, 2, -1) for tensor in tensors]

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """Return the tensors [X, Y] with each head's two halves one after the other, as in HuggingFace."""
        return [self._reorder(tensor, -1, 2) for tensor in tensors]

    def _reorder(self, tensor_XY: Tensor, first: int, second: int) -> Tensor:
        """Return the tensor [X, Y] with each head's rows transposed as a grid of `first` x `second` rows."""
        heads = tensor_XY.reshape(self.heads, first, second, *tensor_XY.shape[1:])
        return heads.transpose(1, 2).reshape(tensor_XY.shape)


@dataclass(frozen=True)
class Stacked:
    """The conversion of the experts' matrices of one layer, which GGUF stores as a single tensor."""

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """Return one tensor [E, X, Y] that stacks the experts' matrices [X, Y]."""
        return [torch.stack(list(tensors))]

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """Return the experts' matrices [X, Y] from one tensor [E, X, Y]."""
        (stack_EXY,) = tensors
        return [expert_XY.clone() for expert_XY in stack_EXY]


@dataclass(frozen=True)
class Latent:
    """The conversion of MLA's matrix that makes keys and values from the latent.

    An example is `Latent(heads=16, nope=128)`. In HuggingFace it is one matrix with `heads * (nope + value)`
    rows: for each head, `nope` rows that make its key and `value` rows that make its value. In GGUF the rows
    of the keys are transposed, [H, R, D], so that they can be absorbed into the query, and those of the
    values are another tensor [H, D, R]. See DeepSeek-V2, arXiv:2405.04434, appendix C.
    """

    heads: int
    nope: int

    def pack(self, tensors: Tensors) -> list[Tensor]:
        """Return the tensors of keys [H, R, D] and of values [H, D, R] from one matrix [X, R]."""
        (rows_XR,) = tensors
        rows_HDR = rows_XR.reshape(self.heads, -1, rows_XR.shape[-1])
        keys_HRD = rows_HDR[:, : self.nope].transpose(1, 2)
        values_HDR = rows_HDR[:, self.nope :]
        return [keys_HRD.contiguous(), values_HDR.contiguous()]

    def unpack(self, tensors: Tensors) -> list[Tensor]:
        """Return one matrix [X, R] from the tensors of keys [H, R, D] and of values [H, D, R]."""
        keys_HRD, values_HDR = tensors
        rows_HDR = torch.cat([keys_HRD.transpose(1, 2), values_HDR], dim=1)
        return [rows_HDR.flatten(0, 1)]


@dataclass(frozen=True)
class Link:
    """The tensors of a GGUF file and those of a HuggingFace directory that hold the same numbers.

    `Link(("blk.0.attn_q.weight",), ("model.layers.0.self_attn.q_proj.weight",), Interleaved(9))`: `ggml` are
    the names in the GGUF file, `theirs` those in HuggingFace, and `form` is the conversion between them.
    """

    ggml: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = Same()


def links(family: Family, tree: dict[str, Any]) -> Iterator[Link]:
    """Yield links for all tensors that a model of this family with this config.json (`tree`) must have."""
    for ours, theirs in OUTER.items():
        if ours != "output.weight" or not tree["tie_word_embeddings"]:
            yield Link((ours,), (theirs,), _form(family, ours, theirs, tree))
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
    """Return the number of layers with a dense feed-forward; these are the first layers."""
    if family.latent:
        return tree["first_k_dense_replace"]
    return 0 if family.sparse else tree["num_hidden_layers"]


def _names(family: Family, tree: dict[str, Any], dense: bool) -> Names:
    """Return the tensors of one layer: their names in GGUF, mapped to those in HuggingFace.

    `dense` is True if the layer has no experts.
    """
    names = {**family.layer, **(family.dense if dense else family.sparse)}
    if family.latent:
        names |= LOW_RANK_QUERIES if tree.get("q_lora_rank") else FULL_QUERIES
    return names


def _in_layer(layer: int, ours: Sequence[str], theirs: Sequence[str], form: Form) -> Link:
    """Return the link of tensors of one layer, which are given by their names without the layer."""
    ggml = tuple(f"blk.{layer}.{name}" for name in ours)
    return Link(ggml, tuple(f"model.layers.{layer}.{name}" for name in theirs), form)


def _each_expert(theirs: str, tree: dict[str, Any]) -> list[str]:
    """Return the name `theirs` once for every expert if it has a place for its number, otherwise alone."""
    if "{}" not in theirs:
        return [theirs]
    experts = tree.get("num_experts") or tree["n_routed_experts"]
    return [theirs.format(expert) for expert in range(experts)]


def _form(family: Family, ours: str, theirs: str, tree: dict[str, Any]) -> Form:
    """Return the conversion of the tensor called `ours` in GGUF and `theirs` in HuggingFace."""
    if "{}" in theirs:
        return Stacked()
    if family.interleaved and ours in ROTATED:
        return Interleaved(tree[ROTATED[ours]])
    if family.norms_from_one and ours.endswith("norm.weight"):
        return FromOne()
    return Same()
