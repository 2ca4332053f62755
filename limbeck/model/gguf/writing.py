"""A HuggingFace directory becomes one GGUF file, which llama.cpp runs: weights, settings, tokenizer and template.

Tensors are read, turned and written one after another, into a partial file that is renamed when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization
from gguf import LlamaFileType
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...types import LimbeckError
from . import rope, vocabulary
from .families import ALIASES, FAMILIES, LATENT_SIZES, ROUTER, Family
from .forms import Link, links

TYPES = {
    "f32": (Quantization.F32, LlamaFileType.ALL_F32),
    "f16": (Quantization.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (Quantization.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
BLOCK = 32  # values of a row that Q8_0 scales together
FLOATS = {"F64", "F32", "F16", "BF16"}
OPTIONAL = ("first_k_dense_replace", "q_lora_rank", "n_group", "topk_group", "sliding_window")  # may be 0
# Rotary frequencies of old checkpoints, which follow from config.json.
HARMLESS = "rotary_emb.inv_freq"


def write(directory: Path, path: Path, kind: str = "f16") -> None:
    """Write the model of `directory` to `path` as `f32`, `f16` or `q8_0`; vectors and routers stay fp32.

    The multi-token-prediction layers of DeepSeek-V3, which llama.cpp does not run, stay out. Raises
    LimbeckError for a model or tokenizer that the format or llama.cpp cannot hold; then nothing is left behind.
    """
    if kind not in TYPES:
        raise LimbeckError(f"there is no GGUF type {kind!r}; types are {', '.join(TYPES)}")
    family, tree = _config(directory / "config.json")
    source = _Weights(directory)
    plan = _plan(source, family, tree)
    part = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(part, family.ggml)
    writer.add_name(path.stem)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_settings(writer, family, tree, str(directory / "config.json"))
    vocabulary.add(writer, directory, tree["vocab_size"])
    try:
        _write(writer, source, plan, tree, kind)
        _flush(part)
        os.replace(part, path)
        _flush(path.parent)
    finally:
        writer.close()
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- settings


def _config(path: Path) -> tuple[Family, dict[str, Any]]:
    """The family of a `config.json`, and the file with every default in its place."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        name = (tree.get("architectures") or ["none"])[0]
    except FileNotFoundError:
        raise LimbeckError(
            f"{path} is missing; a model directory holds config.json and *.safetensors"
        ) from None
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise LimbeckError(
            f"{path}: no model's configuration ({error}); copy it again from its source"
        ) from None
    if name not in FAMILIES:
        raise LimbeckError(
            f"{path}: architecture {name} has no GGUF here; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    tree = {ALIASES.get(key, key): value for key, value in tree.items() if value is not None}
    sizes = ["vocab_size", *(LATENT_SIZES if family.latent else ())]
    _check(tree, {**{key.theirs: key.kind for key in family.keys}, **dict.fromkeys(sizes, int)}, path)
    heads = tree["num_attention_heads"]
    defaults = {"num_key_value_heads": heads, "head_dim": tree["hidden_size"] // heads}
    tree = {**defaults, "tie_word_embeddings": False, **tree}
    _check(tree, {key: int for key in (*defaults, *OPTIONAL) if key in tree}, path)
    _refuse(tree, family, path)
    if tree.get("use_sliding_window", name == "MistralForCausalLM") and tree.get("sliding_window"):
        # within one window there is nothing to forget, and llama.cpp computes the same
        tree["max_position_embeddings"] = min(tree["max_position_embeddings"], tree["sliding_window"])
    return family, tree


def _check(tree: dict[str, Any], kinds: dict[str, type], path: Path) -> None:
    """That settings are there, of their kind, and sizes above zero."""
    for key, kind in kinds.items():
        found = tree.get(key)
        least = key not in OPTIONAL
        if not isinstance(found, (int, float) if kind is float else kind) or (kind is int and found < least):
            raise LimbeckError(
                f"{path}: {key} = {found!r} is no setting; copy the file again from its source"
            )


def _refuse(tree: dict[str, Any], family: Family, path: Path) -> None:
    """What would make llama.cpp compute something else."""
    if tree.get("quantization_config"):
        raise LimbeckError(
            f"{path}: quantization_config says the weights are quantised; export the unquantised model"
        )
    for key, value in family.wanted.items():
        found = tree.get(key, False if key == "norm_topk_prob" else value)
        if (found or None) != (value or None):
            raise LimbeckError(
                f"{path}: {key} = {found!r} is not what llama.cpp computes for {family.ggml}; only {value!r} is"
            )
    if (
        family.model_type == "deepseek_v2"
        and tree.get("topk_method") == "group_limited_greedy"
        and _grouped(tree)
    ):
        raise LimbeckError(
            f"{path}: topk_method = 'group_limited_greedy' is not what llama.cpp computes; it rates a group of "
            "experts by its two best, as DeepSeek-V3 does"
        )


def _grouped(tree: dict[str, Any]) -> bool:
    """Whether some groups of experts are left out."""
    return 0 < tree.get("topk_group", 0) < tree.get("n_group", 0)


def _add_settings(writer: gguf.GGUFWriter, family: Family, tree: dict[str, Any], where: str) -> None:
    theta, scaling = rope.settle(tree, where)
    found = {key.ggml: key.kind(tree[key.theirs]) for key in family.keys}
    found |= {"vocab_size": tree["vocab_size"], "rope.freq_base": theta}
    found |= _latent(family, tree) if family.latent else _heads(tree)
    found |= rope.settings(scaling, family.ggml, where)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in found.items():
        add[type(value)](f"{family.ggml}.{key}", value)


def _heads(tree: dict[str, Any]) -> dict[str, int]:
    lengths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return {
        "attention.head_count_kv": tree["num_key_value_heads"],
        **dict.fromkeys(lengths, tree["head_dim"]),
    }


def _latent(family: Family, tree: dict[str, Any]) -> dict[str, int]:
    """MLA as llama.cpp runs it: one key and value head, the latent, and what it widens to."""
    rank, positions = tree["kv_lora_rank"], tree["qk_rope_head_dim"]
    groups = (
        {"expert_group_count": "n_group", "expert_group_used_count": "topk_group"} if _grouped(tree) else {}
    )
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + positions,
        "attention.value_length": rank,
        "attention.key_length_mla": tree["qk_nope_head_dim"] + positions,
        "attention.value_length_mla": tree["v_head_dim"],
        "attention.q_lora_rank": tree.get("q_lora_rank") or 0,
        "rope.dimension_count": positions,
        "expert_gating_func": int(family.gate),
        **{ours: tree[theirs] for ours, theirs in groups.items()},
    }


# ---------------------------------------------------------------- tensors


class _Weights(Mapping[str, Tensor]):
    """The tensors of a directory by name, each read when it is asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files = {}
        for path in sorted(directory.glob("model*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise LimbeckError(
                    f"{path}: truncated or damaged ({error}); copy it again from its source"
                ) from None
            self._files |= dict.fromkeys(file.keys(), file)
        if not self._files:
            raise LimbeckError(
                f"{directory / 'model.safetensors'} is missing; weights are read from safetensors files only"
            )

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> Tensor:
        """The tensor without its numbers."""
        found = self._files[name].get_slice(name)
        if found.get_dtype() not in FLOATS:
            raise LimbeckError(
                f"{self.directory}: tensor {name} is {found.get_dtype()}, already quantised; export the unquantised model"
            )
        return torch.empty(found.get_shape(), device="meta")


def _plan(source: _Weights, family: Family, tree: dict[str, Any]) -> list[Link]:
    """What becomes what: all tensors are there, and none that has no place."""
    plan = list(links(family, tree))
    known = {name for link in plan for name in link.theirs}
    if missing := sorted(known - set(source)):
        raise LimbeckError(
            f"{source.directory}: {len(missing)} tensors are missing ({', '.join(missing[:3])}); copy the weights again"
        )
    if (rows := source.shape("model.embed_tokens.weight").shape[0]) != tree["vocab_size"]:
        raise LimbeckError(
            f"{source.directory}: the embedding has {rows} rows, config.json says vocab_size = {tree['vocab_size']}; "
            "the two are of different models"
        )
    if strange := sorted(name for name in set(source) - known if not _left_out(name, tree)):
        raise LimbeckError(
            f"{source.directory}: tensor {strange[0]} has no place in {family.ggml}; check config.json"
        )
    return plan


def _left_out(name: str, tree: dict[str, Any]) -> bool:
    """A tied head told twice, old frequencies, and layers beyond the last, which predict more tokens at once."""
    parts = name.split(".")
    beyond = (
        parts[:2] == ["model", "layers"] and parts[2].isdigit() and int(parts[2]) >= tree["num_hidden_layers"]
    )
    return beyond or name.endswith(HARMLESS) or (name == "lm_head.weight" and tree["tie_word_embeddings"])


def _write(
    writer: gguf.GGUFWriter, source: _Weights, plan: list[Link], tree: dict[str, Any], kind: str
) -> None:
    factors = _factors(tree)
    if factors is not None:
        writer.add_tensor_info(rope.FACTORS, factors.shape, factors.dtype, factors.nbytes)
    kinds = {}
    for link in plan:
        for name, tensor in zip(link.ggml, _shapes(source, link), strict=True):
            kinds[name] = _kind(name, tensor.shape, kind)
            shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kinds[name])
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for link in plan:
        packed = link.form.pack([source[name] for name in link.theirs])
        for name, tensor in zip(link.ggml, packed, strict=True):
            writer.write_tensor_data(_quantize(name, tensor, kinds[name]))


def _shapes(source: _Weights, link: Link) -> list[Tensor]:
    shapes = [source.shape(name) for name in link.theirs]
    try:
        return link.form.pack(shapes)
    except RuntimeError:
        raise LimbeckError(
            f"{source.directory}: {link.theirs[0]} is {tuple(shapes[0].shape)}, which config.json's sizes do not divide; "
            "the two are of different models"
        ) from None


def _factors(tree: dict[str, Any]) -> np.ndarray | None:
    theta, scaling = rope.settle(tree, "config.json")
    if scaling.get("rope_type") != "llama3":
        return None
    return rope.factors(theta, tree["head_dim"], scaling).astype(np.float32)


def _kind(name: str, shape: torch.Size, kind: str) -> Quantization:
    """Vectors and routers are small, and matter: fp32. Rows that blocks do not fill: f16."""
    if len(shape) == 1 or name.endswith(ROUTER):
        return Quantization.F32
    return Quantization.F16 if kind == "q8_0" and shape[-1] % BLOCK else TYPES[kind][0]


def _quantize(name: str, tensor: Tensor, kind: Quantization) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
    if kind == Quantization.F16 and not np.isfinite(values).all():
        raise LimbeckError(f"tensor {name} holds numbers that f16 cannot; export as f32 or q8_0")
    return values.view(np.uint8)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
