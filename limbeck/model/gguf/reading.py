"""Conversion of a GGUF file to a HuggingFace directory: fp32 weights, settings, tokenizer and chat template.

A plan maps the name of each HuggingFace tensor to its link (forms.py), which names its source in the GGUF
file, and to its index among the link's tensors. X rows of a matrix · Y its columns.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ...types import LimbeckError
from .. import weights
from ..config import ModelConfig
from . import rope, vocabulary
from .families import FAMILIES, LOCAL_BASE, PERIOD, Family, Key
from .forms import Link, links

REQUIRED = object()
KINDS = {int: "one number", float: "one number", bool: "true or false", str: "a text", list: "a list"}

Tree = dict[str, Any]
Plan = dict[str, tuple[Link, int]]  # name of a HuggingFace tensor -> its link, its index in it


# ---------------------------------------------------------------- the file


class _Reader(gguf.GGUFReader):
    """The reader of the gguf package; its error for an unknown quantisation also names the tensor."""

    def _build_tensors(self, start: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            kind = int(field.parts[4][0])
            if kind not in iter(gguf.GGMLQuantizationType):
                raise LimbeckError(
                    f"tensor {field.name} has the unknown quantisation {kind}; "
                    "take a file in Q8_0 or F16 instead"
                )
        super()._build_tensors(start, fields)


def _open(path: Path) -> _Reader:
    """Return a reader of the GGUF file at `path`."""
    try:
        return _Reader(path)
    except FileNotFoundError:
        raise LimbeckError(f"{path} is missing; give the path of a GGUF file") from None
    except LimbeckError as error:
        raise LimbeckError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise LimbeckError(f"{path}: not a GGUF file, or truncated ({error}); download it again") from None


class _File:
    """An open GGUF file: its path, its keys, its tensors by name, and the name of its architecture.

    Raises:
        LimbeckError: the file is damaged, or has an unsupported architecture or quantisation.
    """

    def __init__(self, path: Path):
        self.path = path
        reader = _open(path)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.architecture = self.get("general.architecture", str)
        known = dict.fromkeys(family.ggml for family in FAMILIES.values())
        if self.architecture not in known:
            raise LimbeckError(
                f"{path}: architecture {self.architecture} is not supported; supported are {', '.join(known)}"
            )
        one_of_each = {tensor.tensor_type: tensor for tensor in reader.tensors}
        for tensor in one_of_each.values():
            self.dequantize(tensor.name, first=True)

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """Return the value of a key, which must be of the type `kind`.

        If the file lacks the key, return `default`; raise LimbeckError if no default is given.
        """
        if key not in self._fields:
            if default is REQUIRED:
                raise LimbeckError(f"{self.path}: key {key} is missing; download the file again")
            return default
        try:
            value = self._fields[key].contents()
        except (UnicodeDecodeError, IndexError):
            value = None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise LimbeckError(
                f"{self.path}: key {key} is damaged, {KINDS[kind]} is needed; download the file again"
            )
        return _shortest(value) if kind is float else value

    def setting(self, key: str, kind: type = int, default: Any = REQUIRED) -> Any:
        """Return the value of a key that begins with the architecture; `key` is the rest of its name."""
        return self.get(f"{self.architecture}.{key}", kind, default)

    def size(self, key: str, default: Any = REQUIRED) -> int:
        """Return the value of a key of the architecture that is a size: a whole number above zero."""
        value = self.setting(key, int, default)
        if value < 1:
            raise LimbeckError(
                f"{self.path}: key {self.architecture}.{key} = {value} is no size; download the file again"
            )
        return value

    def dequantize(self, name: str, first: bool = False) -> Tensor:
        """Return a tensor [X, Y] converted to fp32; with `first`, only its first row."""
        tensor = self.tensors[name]
        data = tensor.data
        if first:
            data = data.reshape(-1, data.shape[-1])[:1]
        try:  # only the library knows the quantisations that it can undo
            values = gguf.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise LimbeckError(
                f"{self.path}: tensor {name} has quantisation {tensor.tensor_type.name}, "
                "which cannot be undone; take Q8_0 or F16 instead"
            ) from None
        return torch.from_numpy(np.array(values, dtype=np.float32))


def _shortest(value: float) -> float:
    """Return the float with the fewest decimal digits that rounds to the same float32 as `value`.

    For example 1e-05 in place of 9.99999974e-06.
    """
    return float(str(np.float32(value)))


# ---------------------------------------------------------------- the directory


def read(path: Path, directory: Path) -> None:
    """Convert the GGUF file at `path` to the model directory `directory`.

    `weights.load`, `Tokenizer.from_directory` and transformers read the result. Every architecture of
    `families.FAMILIES` with a byte-pair tokenizer can be read, in any quantisation that the gguf package can
    convert to fp32.

    Raises:
        LimbeckError: the file is not supported, truncated or damaged.
    """
    file = _File(path)
    name, family = _family(file)
    tree = _tree(file, name, family)
    plan = _plan(file, family, tree)
    sizes = _sizes(file, plan)
    tokenizer = vocabulary.build(file.get, path)
    settings = _tokenizer_settings(file)
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(file, plan, sizes, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    weights.write_json(directory / "tokenizer_config.json", settings)
    if "chat_template" in settings:
        template = directory / "chat_template.jinja"
        template.write_text(settings["chat_template"], encoding="utf-8")
    ids = _special_tokens(file)
    generation = {key: ids[key] for key in ("eos_token_id", "pad_token_id")}
    weights.write_json(directory / "generation_config.json", generation)
    weights.write_json(directory / "config.json", {**tree, **ids, "torch_dtype": "float32"})
    weights.flush(directory)


def read_config(path: Path) -> ModelConfig:
    """Return the configuration of the model in the GGUF file at `path`; its weights are not read.

    Raises:
        LimbeckError: the file is not supported, truncated or damaged.
    """
    file = _File(path)
    return ModelConfig.from_hf(_tree(file, *_family(file)), str(path))


def _tree(file: _File, name: str, family: Family) -> Tree:
    """Return the settings of config.json, except the ids of special tokens."""
    return {"architectures": [name], "model_type": family.model_type, **_config(file, family)}


def _family(file: _File) -> tuple[str, Family]:
    """Return the name of the model's class in transformers and its family, from the architecture of the file.

    DeepSeek-V2 and V3 have the same architecture in GGUF and are told apart by the router's gate.
    """
    gate = file.setting("expert_gating_func", int, gguf.ExpertGatingFuncType.SOFTMAX)
    for name, family in FAMILIES.items():
        if family.ggml == file.architecture and family.gate in (None, gate):
            return name, family
    raise LimbeckError(
        f"{file.path}: a gate of type {gate} is not supported; supported are softmax and sigmoid"
    )


def _config(file: _File, family: Family) -> Tree:
    """Return the settings of config.json, except the architecture's name and the ids of special tokens."""
    tree = {key.theirs: _setting(file, key) for key in family.keys}
    if "token_embd.weight" not in file.tensors:
        raise LimbeckError(f"{file.path}: tensor token_embd.weight is missing; download the file again")
    tree["vocab_size"] = int(file.tensors["token_embd.weight"].shape[1])
    tree["tie_word_embeddings"] = "output.weight" not in file.tensors
    tree |= _latent(file, family) if family.latent else _heads(file, tree)
    if family.ggml == "gemma3":
        tree |= _gemma(file, tree)
    theta = file.setting("rope.freq_base", float, 10_000.0)
    scaling = _rope_scaling(file, theta, tree["head_dim"])
    if family.latent:
        tree.pop("head_dim")
    return {**family.wanted, **tree, "rope_theta": theta, "rope_scaling": scaling or None}


def _setting(file: _File, key: Key) -> Any:
    """Return the value of `key`; a key without a default must be in the file and must be a size."""
    if key.default is None:
        return file.size(key.ggml)
    return file.setting(key.ggml, key.kind, key.default)


def _rope_scaling(file: _File, theta: float, head_dim: int) -> Tree:
    """Return config.json's `rope_scaling`, from the file's keys or from its tensor of frequency divisors.

    `theta` is the base of the rotary positions. The result is `{}` if there is no scaling.
    """
    where = str(file.path)
    scaling = rope.scaling(file.setting, where)
    if scaling or rope.FACTORS not in file.tensors:
        return scaling
    return rope.llama3(file.dequantize(rope.FACTORS).numpy(), theta, head_dim, where)


def _heads(file: _File, tree: Tree) -> dict[str, int]:
    """Return the keys of config.json for the heads of grouped-query attention."""
    heads = tree["num_attention_heads"]
    head_dim = file.size("attention.key_length", tree["hidden_size"] // heads)
    partial = file.setting("rope.dimension_count", int, head_dim) != head_dim
    if partial or (file.setting("expert_count", int, 0) and "num_experts" not in tree):
        raise LimbeckError(
            f"{file.path}: partial rotary positions and experts are not supported in {file.architecture}; "
            "take a dense model"
        )
    return {"num_key_value_heads": file.size("attention.head_count_kv", heads), "head_dim": head_dim}


def _gemma(file: _File, tree: Tree) -> Tree:
    """Return the keys of config.json that Gemma 3 has beside those of other families.

    Like llama.cpp, it takes the scale of attention from the hidden size in the model of 62 layers (27B), and
    from the size of a head in all others.
    """
    layers = tree["num_hidden_layers"]
    period = file.size("attention.sliding_window_pattern", PERIOD)
    kinds = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]
    largest = layers == 62
    scalar = tree["hidden_size"] // tree["num_attention_heads"] if largest else tree["head_dim"]
    return {
        "layer_types": kinds,
        "query_pre_attn_scalar": scalar,
        "rope_local_base_freq": file.setting("rope.freq_base_swa", float, LOCAL_BASE),
    }


def _latent(file: _File, family: Family) -> Tree:
    """Return the keys of config.json for multi-head latent attention and for the groups of experts.

    llama.cpp's plain key length and number of key heads describe its cache, so the full sizes of a head are
    read from the keys that end in `_mla`.
    """
    positions = file.size("rope.dimension_count")
    key_length = file.size("attention.key_length_mla")
    if key_length <= positions:
        raise LimbeckError(
            f"{file.path}: key {file.architecture}.attention.key_length_mla is damaged; "
            "download the file again"
        )
    groups = file.setting("expert_group_count", int, 1)
    tree = {
        "num_key_value_heads": file.size("attention.head_count"),
        "head_dim": positions,
        "qk_rope_head_dim": positions,
        "qk_nope_head_dim": key_length - positions,
        "v_head_dim": file.size("attention.value_length_mla"),
        "q_lora_rank": file.setting("attention.q_lora_rank", int, 0) or None,
        "n_group": groups,
        "topk_group": file.setting("expert_group_used_count", int, groups),
    }
    if groups > 1 and family.model_type == "deepseek_v2":
        tree["topk_method"] = "group_limited_greedy"
    return tree


# ---------------------------------------------------------------- tensors


def _plan(file: _File, family: Family, tree: Tree) -> Plan:
    """Return the link and the index in it of each HuggingFace tensor.

    Raises LimbeckError if a tensor is missing from the file, or if the file has one that the architecture
    does not know.
    """
    plan: Plan = {}
    known = {rope.FACTORS}
    for link in links(family, tree):
        for name in link.ggml:
            if name not in file.tensors:
                raise LimbeckError(f"{file.path}: tensor {name} is missing; download the file again")
        known |= set(link.ggml)
        plan |= {name: (link, i) for i, name in enumerate(link.theirs)}
    unknown = sorted(set(file.tensors) - known)
    if unknown:
        raise LimbeckError(
            f"{file.path}: tensor {unknown[0]} has no place in {file.architecture}; "
            "it is another architecture"
        )
    return plan


def _sizes(file: _File, plan: Plan) -> dict[str, int]:
    """Return the bytes of each HuggingFace tensor in fp32, by name."""
    sizes = {}
    for link in dict.fromkeys(link for link, _ in plan.values()):
        shapes = [tuple(map(int, reversed(file.tensors[name].shape))) for name in link.ggml]
        try:
            tensors = link.form.unpack([torch.empty(shape, device="meta") for shape in shapes])
            sizes |= {name: 4 * tensor.numel() for name, tensor in zip(link.theirs, tensors, strict=True)}
        except (RuntimeError, ValueError):
            raise LimbeckError(
                f"{file.path}: tensor {link.ggml[0]} is {shapes[0]}, "
                "which the sizes in the file do not divide; download it again"
            ) from None
    return sizes


def _write_weights(file: _File, plan: Plan, sizes: dict[str, int], directory: Path) -> None:
    """Convert all tensors to fp32 and write them; only those of one output file are in memory at a time."""

    @lru_cache(maxsize=1)  # the experts of a layer come out of one stack, one after another
    def unpack(link: Link) -> list[Tensor]:
        """Return the HuggingFace tensors [X, Y] of one link."""
        return link.form.unpack([file.dequantize(name) for name in link.ggml])

    def fetch(name: str) -> Tensor:
        """Return the HuggingFace tensor called `name`, [X, Y]."""
        link, i = plan[name]
        return unpack(link)[i].contiguous()

    weights.write(directory, sizes, fetch)


# ---------------------------------------------------------------- tokens


def _tokenizer_settings(file: _File) -> Tree:
    """Return the content of `tokenizer_config.json`."""
    tokens = file.get("tokenizer.ggml.tokens", list)
    settings: Tree = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, token in _special_tokens(file).items():
        settings[key.removesuffix("_id")] = None if token is None else tokens[token]
    template = file.get("tokenizer.chat_template", str, "")
    settings["model_max_length"] = file.size("context_length")
    settings["clean_up_tokenization_spaces"] = False
    if file.get("tokenizer.ggml.add_bos_token", bool, False):
        settings["add_bos_token"] = True
    if template:
        settings["chat_template"] = template
    return settings


def _special_tokens(file: _File) -> dict[str, int | None]:
    """Return the ids of the special tokens, under the keys of config.json.

    Without a beginning-of-sequence token its id is None; without a padding token its id is that of the
    end-of-sequence token, which must be there.
    """
    end = vocabulary.special_token(file.get, "eos", file.path)
    return {
        "bos_token_id": vocabulary.special_token(file.get, "bos", file.path, None),
        "eos_token_id": end,
        "pad_token_id": vocabulary.special_token(file.get, "padding", file.path, end),
    }
