"""Conversion of a HuggingFace directory to a GGUF file: weights, settings, tokenizer and chat template.

Tensors are read, converted and written one link (forms.py) at a time, to a partial file that is renamed when
it is complete. A plan is the list of all links of the model. X rows of a matrix · Y its columns · D / 2
frequencies of a head of D dimensions.
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

from ...files import sync
from ...types import LimbeckError
from ..config import ModelConfig
from ..hf_config import gemma_defaults
from . import rope, vocabulary
from .families import ALIASES, FAMILIES, LATENT_SIZES, LOCAL_BASE, PERIOD, ROUTER, Family
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

Tree = dict[str, Any]


def check_type(kind: str) -> None:
    """Refuse a type of weights that `write` does not know.

    Raises:
        LimbeckError: the type is not in `TYPES`.
    """
    if kind not in TYPES:
        raise LimbeckError(f"there is no GGUF type {kind!r}; types are {', '.join(TYPES)}")


def write(directory: Path, path: Path, kind: str = "f16") -> None:
    """Convert the model in `directory` to a GGUF file at `path`, with weights as `f32`, `f16` or `q8_0`.

    Vectors and routers are always stored in fp32. The layers of multi-token prediction of DeepSeek-V3 are
    left out, as llama.cpp does not run them.

    Raises:
        LimbeckError: GGUF or llama.cpp does not support the model or its tokenizer; no file is left
            behind.
    """
    check_type(kind)
    family, tree = _config(directory / "config.json")
    source = _Weights(directory)
    plan = _plan(source, family, tree)
    partial = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(partial, family.ggml)
    writer.add_name(path.stem)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_settings(writer, family, tree, str(directory / "config.json"))
    vocabulary.add(writer, directory, tree["vocab_size"])
    try:
        kinds = _write_header(writer, source, plan, tree, kind)
        _write_tensors(writer, source, plan, kinds)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------- settings


def _config(path: Path) -> tuple[Family, Tree]:
    """Return the family of a `config.json`, and its settings completed by default values."""
    name, tree = _read_config(path)
    family = FAMILIES[name]
    tree = {ALIASES.get(key, key): value for key, value in tree.items() if value is not None}
    if name == "Gemma3ForCausalLM":
        tree = {**gemma_defaults(tree), **tree}
    kinds = {key.theirs: key.kind for key in family.keys}
    kinds["vocab_size"] = int
    if family.latent:
        kinds |= dict.fromkeys(LATENT_SIZES, int)
    _check(tree, kinds, path)
    heads = tree["num_attention_heads"]
    defaults = {"num_key_value_heads": heads, "head_dim": tree["hidden_size"] // heads}
    tree = {**defaults, "tie_word_embeddings": False, **tree}
    _check(tree, {key: int for key in (*defaults, *OPTIONAL) if key in tree}, path)
    _refuse_unsupported(tree, family, path)
    if name == "Gemma3ForCausalLM":
        _check_gemma(tree, path)
    elif tree.get("use_sliding_window", name == "MistralForCausalLM") and tree.get("sliding_window"):
        # within one window there is nothing to forget, and llama.cpp computes the same
        tree["max_position_embeddings"] = min(tree["max_position_embeddings"], tree["sliding_window"])
    return family, tree


def _read_config(path: Path) -> tuple[str, Tree]:
    """Return the name of the model's class in transformers, and the settings of a `config.json`."""
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
    return name, tree


def _check(tree: Tree, kinds: dict[str, type], path: Path) -> None:
    """Refuse settings that are missing or of another type than `kinds` says, and sizes below 1.

    Sizes in `OPTIONAL` may be 0.
    """
    for key, kind in kinds.items():
        value = tree.get(key)
        allowed = (int, float) if kind is float else kind
        least = 0 if key in OPTIONAL else 1
        if not isinstance(value, allowed) or (kind is int and value < least):
            raise LimbeckError(
                f"{path}: {key} = {value!r} is no setting; copy the file again from its source"
            )


def _refuse_unsupported(tree: Tree, family: Family, path: Path) -> None:
    """Refuse settings with which llama.cpp would compute other logits than transformers."""
    if tree.get("quantization_config"):
        raise LimbeckError(
            f"{path}: quantization_config says the weights are quantised; export the unquantised model"
        )
    for key, wanted in family.wanted.items():
        value = tree.get(key, False if key == "norm_topk_prob" else wanted)
        if (value or None) != (wanted or None):
            raise LimbeckError(
                f"{path}: {key} = {value!r} is not what llama.cpp computes for {family.ggml}; "
                f"only {wanted!r} is"
            )
    limited = tree.get("topk_method") == "group_limited_greedy"
    if limited and family.model_type == "deepseek_v2" and _is_grouped(tree):
        raise LimbeckError(
            f"{path}: topk_method = 'group_limited_greedy' is not what llama.cpp computes; "
            "it rates a group of experts by its two best, as DeepSeek-V3 does"
        )


def _check_gemma(tree: Tree, path: Path) -> None:
    """Refuse settings of Gemma 3 for which GGUF has no keys, and that differ from those of llama.cpp."""
    config = ModelConfig.from_hf(tree, str(path))
    local = [bool(config.window(layer)) for layer in range(config.layers)]
    expected = {
        "layer_types": (local, [bool((layer + 1) % PERIOD) for layer in range(config.layers)]),
        "rope_local_base_freq": (config.local_theta, LOCAL_BASE),
        "query_pre_attn_scalar": (config.query_scalar, config.head_dim),
    }
    for key, (value, wanted) in expected.items():
        if value != wanted:
            raise LimbeckError(
                f"{path}: {key} is not what llama.cpp computes for gemma3; export another model"
            )


def _is_grouped(tree: Tree) -> bool:
    """Return True if tokens choose from only some of the groups of experts."""
    return 0 < tree.get("topk_group", 0) < tree.get("n_group", 0)


def _add_settings(writer: gguf.GGUFWriter, family: Family, tree: Tree, where: str) -> None:
    """Write the settings whose names begin with the architecture; `where` names the file in errors."""
    theta, scaling = rope.settle(tree, where)
    settings = {key.ggml: key.kind(tree[key.theirs]) for key in family.keys}
    settings |= {"vocab_size": tree["vocab_size"], "rope.freq_base": theta}
    settings |= _latent(family, tree) if family.latent else _heads(tree)
    settings |= rope.settings(scaling, family.ggml, where)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings.items():
        add[type(value)](f"{family.ggml}.{key}", value)


def _heads(tree: Tree) -> dict[str, int]:
    """Return the GGUF keys for the heads of grouped-query attention."""
    head_dim = tree["head_dim"]
    return {
        "attention.head_count_kv": tree["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }


def _latent(family: Family, tree: Tree) -> dict[str, int]:
    """Return the GGUF keys for multi-head latent attention, for the router's gate and for groups of experts.

    llama.cpp runs this attention with a single key and value head, the latent, and its sizes are the main
    keys; the sizes of the full heads are stored under the keys that end in `_mla`.
    """
    rank = tree["kv_lora_rank"]
    positions = tree["qk_rope_head_dim"]
    settings = {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + positions,
        "attention.value_length": rank,
        "attention.key_length_mla": tree["qk_nope_head_dim"] + positions,
        "attention.value_length_mla": tree["v_head_dim"],
        "attention.q_lora_rank": tree.get("q_lora_rank") or 0,
        "rope.dimension_count": positions,
        "expert_gating_func": int(family.gate),
    }
    if _is_grouped(tree):
        settings["expert_group_count"] = tree["n_group"]
        settings["expert_group_used_count"] = tree["topk_group"]
    return settings


# ---------------------------------------------------------------- tensors


class _Weights(Mapping[str, Tensor]):
    """The tensors of a model directory by name; each is read from its file when it is accessed."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[str, Any] = {}
        for path in sorted(directory.glob("model*.safetensors")):
            file = _open(path)
            self._files |= dict.fromkeys(file.keys(), file)
        if not self._files:
            raise LimbeckError(
                f"{directory / 'model.safetensors'} is missing; weights are read from safetensors files only"
            )

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor called `name`, [X, Y]."""
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> Tensor:
        """Return an empty tensor [X, Y] on the device `meta`, with the shape of the tensor called `name`."""
        part = self._files[name].get_slice(name)
        if part.get_dtype() not in FLOATS:
            raise LimbeckError(
                f"{self.directory}: tensor {name} is {part.get_dtype()}, already quantised; "
                "export the unquantised model"
            )
        return torch.empty(part.get_shape(), device="meta")


def _open(path: Path) -> Any:
    """Return an open safetensors file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LimbeckError(f"{path}: truncated or damaged ({error}); copy it again from its source") from None


def _plan(source: _Weights, family: Family, tree: Tree) -> list[Link]:
    """Return the links of all tensors of the model.

    Raises LimbeckError if a tensor is missing, or if one is left over that the architecture does not know.
    """
    plan = list(links(family, tree))
    known = {name for link in plan for name in link.theirs}
    missing = sorted(known - set(source))
    if missing:
        raise LimbeckError(
            f"{source.directory}: {len(missing)} tensors are missing ({', '.join(missing[:3])}); "
            "copy the weights again"
        )
    rows = source.shape("model.embed_tokens.weight").shape[0]
    if rows != tree["vocab_size"]:
        raise LimbeckError(
            f"{source.directory}: the embedding has {rows} rows, "
            f"config.json says vocab_size = {tree['vocab_size']}; the two are of different models"
        )
    unknown = sorted(name for name in set(source) - known if not _is_left_out(name, tree))
    if unknown:
        raise LimbeckError(
            f"{source.directory}: tensor {unknown[0]} has no place in {family.ggml}; check config.json"
        )
    return plan


def _is_left_out(name: str, tree: Tree) -> bool:
    """Return True for tensors that are not written.

    These are a head that is tied to the embedding, the rotary frequencies of old checkpoints, and the layers
    of multi-token prediction.
    """
    if name.endswith(HARMLESS):
        return True
    if name == "lm_head.weight":
        return tree["tie_word_embeddings"]
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or not parts[2].isdigit():
        return False
    return int(parts[2]) >= tree["num_hidden_layers"]


def _write_header(
    writer: gguf.GGUFWriter, source: _Weights, plan: list[Link], tree: Tree, kind: str
) -> dict[str, Quantization]:
    """Write all that comes before the weights, and the rope factors; return each tensor's quantisation.

    The rope factors are Llama 3.1's divisors of rotary frequencies. `kind` is a key of `TYPES`.
    """
    factors = _rope_factors(tree)
    if factors is not None:
        writer.add_tensor_info(rope.FACTORS, factors.shape, factors.dtype, factors.nbytes)
    kinds = {}
    for link in plan:
        for name, tensor in zip(link.ggml, _shapes(source, link), strict=True):
            kinds[name] = _quantization(name, tensor.shape, kind)
            shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kinds[name])
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    return kinds


def _write_tensors(
    writer: gguf.GGUFWriter, source: _Weights, plan: list[Link], kinds: dict[str, Quantization]
) -> None:
    """Write all weights, those of one link at a time; `kinds` is the quantisation of each tensor by name."""
    for link in plan:
        packed = link.form.pack([source[name] for name in link.theirs])
        for name, tensor in zip(link.ggml, packed, strict=True):
            writer.write_tensor_data(_quantize(name, tensor, kinds[name]))


def _shapes(source: _Weights, link: Link) -> list[Tensor]:
    """Return empty tensors on the device `meta` with the shapes [X, Y] of a link's tensors in GGUF."""
    shapes = [source.shape(name) for name in link.theirs]
    try:
        return link.form.pack(shapes)
    except RuntimeError:
        raise LimbeckError(
            f"{source.directory}: {link.theirs[0]} is {tuple(shapes[0].shape)}, "
            "which config.json's sizes do not divide; the two are of different models"
        ) from None


def _rope_factors(tree: Tree) -> np.ndarray | None:
    """Return Llama 3.1's divisors of rotary frequencies, [D / 2]; None for other scalings."""
    theta, scaling = rope.settle(tree, "config.json")
    if scaling.get("rope_type") != "llama3":
        return None
    return rope.factors(theta, tree["head_dim"], scaling).astype(np.float32)


def _quantization(name: str, shape: torch.Size, kind: str) -> Quantization:
    """Return the quantisation of a tensor: fp32 for vectors and routers, otherwise that of `kind`.

    For q8_0, tensors whose rows are not a multiple of 32 values are stored as f16.
    """
    if len(shape) == 1 or name.endswith(ROUTER):
        return Quantization.F32
    if kind == "q8_0" and shape[-1] % BLOCK:
        return Quantization.F16
    return TYPES[kind][0]


def _quantize(name: str, tensor: Tensor, kind: Quantization) -> np.ndarray:
    """Return the bytes of a tensor [X, Y] quantised as `kind`."""
    with np.errstate(over="ignore"):
        values = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
    if kind == Quantization.F16 and not np.isfinite(values).all():
        raise LimbeckError(f"tensor {name} holds numbers that f16 cannot; export as f32 or q8_0")
    return values.view(np.uint8)
