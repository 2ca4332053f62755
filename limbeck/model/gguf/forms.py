"""The forms in which llama.cpp keeps tensors, and their way back: same numbers, other rows, stacks and halves.

`pack` and `unpack` also take tensors of the device `meta`, and so tell shapes without reading anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .families import FULL_QUERIES, KEYS_VALUES, LOW_RANK_QUERIES, OUTER, Family


class Form(Protocol):
    """How tensors of HuggingFace stand in a GGUF file."""

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...

    def unpack(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Same:
    """Nothing changes: `Same()`."""

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    unpack = pack


@dataclass(frozen=True)
class Interleaved:
    """Query and key rows of Llama: `Interleaved(heads=9)`. llama.cpp rotates neighbours, transformers halves."""

    heads: int

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.reshape(self.heads, 2, -1, *t.shape[1:]).transpose(1, 2).reshape(t.shape) for t in tensors]

    def unpack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.reshape(self.heads, -1, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape) for t in tensors]


@dataclass(frozen=True)
class Stacked:
    """The matrices of all experts of a layer as one, expert first: `Stacked()`."""

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(list(tensors))]

    def unpack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [expert.clone() for (stack,) in [tensors] for expert in stack]


@dataclass(frozen=True)
class Latent:
    """What widens the latent of MLA: `Latent(heads=16, nope=128)`, 128 rows of each head's keys without position.

    One matrix of `heads * (nope + value)` rows becomes the keys, turned for absorption into the query
    (heads, rank, nope), and the values (heads, value, rank). DeepSeek-V2, arXiv:2405.04434, appendix C.
    """

    heads: int
    nope: int

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (rows,) = tensors
        heads = rows.reshape(self.heads, -1, rows.shape[-1])
        return [heads[:, : self.nope].transpose(1, 2).contiguous(), heads[:, self.nope :].contiguous()]

    def unpack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        keys, values = tensors
        return [torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)]


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
    dense = (
        tree["first_k_dense_replace"] if family.latent else 0 if family.sparse else tree["num_hidden_layers"]
    )
    for layer in range(tree["num_hidden_layers"]):
        names = {**family.layer, **(family.dense if layer < dense else family.sparse)}
        if family.latent:
            names |= LOW_RANK_QUERIES if tree.get("q_lora_rank") else FULL_QUERIES
            ours, theirs = KEYS_VALUES
            form = Latent(tree["num_attention_heads"], tree["qk_nope_head_dim"])
            yield _in_layer(layer, ours, (theirs,), form)
        for ours, theirs in names.items():
            yield _in_layer(layer, (ours,), _each(theirs, tree), _form(family, ours, theirs, tree))


def _in_layer(layer: int, ours: Sequence[str], theirs: Sequence[str], form: Form) -> Link:
    prefix = f"model.layers.{layer}"
    return Link(
        tuple(f"blk.{layer}.{name}" for name in ours), tuple(f"{prefix}.{name}" for name in theirs), form
    )


def _each(theirs: str, tree: dict[str, Any]) -> list[str]:
    """The names of all experts, or the one name."""
    if "{}" not in theirs:
        return [theirs]
    return [theirs.format(expert) for expert in range(tree.get("num_experts") or tree["n_routed_experts"])]


def _form(family: Family, ours: str, theirs: str, tree: dict[str, Any]) -> Form:
    if "{}" in theirs:
        return Stacked()
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
    return Interleaved(tree[heads[ours]]) if family.interleaved and ours in heads else Same()
