"""A GGUF file becomes a HuggingFace directory: weights dequantised to fp32, tokenizer and template rebuilt."""

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
from . import rope, vocabulary
from .families import FAMILIES, Family
from .forms import Link, links

REQUIRED = object()


class _Reader(gguf.GGUFReader):
    """The library's reader, which knows of a strange quantisation only its number; here it has a tensor."""

    def _build_tensors(self, start: int, fields: list[gguf.ReaderField]) -> None:
        for field in fields:
            kind = int(field.parts[4][0])
            if kind not in iter(gguf.GGMLQuantizationType):
                raise LimbeckError(
                    f"tensor {field.name} has the unknown quantisation {kind}; take a file in Q8_0 or F16 instead"
                )
        super()._build_tensors(start, fields)


class _File:
    """An open GGUF: its path, its keys, its tensors by name, and the family that it belongs to."""

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = _Reader(path)
        except FileNotFoundError:
            raise LimbeckError(f"{path} is missing; give the path of a GGUF file") from None
        except LimbeckError as error:
            raise LimbeckError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise LimbeckError(
                f"{path}: not a GGUF file, or truncated ({error}); download it again"
            ) from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.architecture = self.get("general.architecture", str)
        if not any(family.ggml == self.architecture for family in FAMILIES.values()):
            known = ", ".join(dict.fromkeys(family.ggml for family in FAMILIES.values()))
            raise LimbeckError(
                f"{path}: architecture {self.architecture} is not supported; supported are {known}"
            )
        for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
            self.dequantize(tensor.name, first=True)

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of a key, which must be of this kind; without default it must be there."""
        if key not in self._fields:
            if default is REQUIRED:
                raise LimbeckError(f"{self.path}: key {key} is missing; download the file again")
            return default
        try:
            found = self._fields[key].contents()
        except (UnicodeDecodeError, IndexError):
            found = None
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind:
            raise LimbeckError(
                f"{self.path}: key {key} is damaged, {_WORDS[kind]} is needed; download the file again"
            )
        return _short(found) if kind is float else found

    def setting(self, key: str, kind: type = int, default: Any = REQUIRED) -> Any:
        return self.get(f"{self.architecture}.{key}", kind, default)

    def size(self, key: str, default: Any = REQUIRED) -> int:
        found = self.setting(key, int, default)
        if found < 1:
            raise LimbeckError(
                f"{self.path}: key {self.architecture}.{key} = {found} is no size; download the file again"
            )
        return found

    def dequantize(self, name: str, first: bool = False) -> Tensor:
        """A tensor in fp32, or only its first row."""
        tensor = self.tensors[name]
        raw = tensor.data.reshape(-1, tensor.data.shape[-1])[:1] if first else tensor.data
        try:  # the file is the user's, and only the library knows which quantisations it can undo
            values = gguf.quants.dequantize(raw, tensor.tensor_type)
        except NotImplementedError:
            raise LimbeckError(
                f"{self.path}: tensor {name} has quantisation {tensor.tensor_type.name}, which cannot be undone; "
                "take Q8_0 or F16 instead"
            ) from None
        return torch.from_numpy(np.array(values, dtype=np.float32))


_WORDS = {int: "one number", float: "one number", bool: "true or false", str: "a text", list: "a list"}


def _short(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where the file's bits say 9.99999974e-06."""
    return float(str(np.float32(value)))


def read(path: Path, directory: Path) -> None:
    """Write `directory` so that `weights.load`, `Tokenizer.from_directory` and transformers read it.

    Every architecture of `families.FAMILIES` with a byte-pair tokenizer, in whatever quantisation the gguf
    package can undo. Raises LimbeckError for any other file and for a truncated or damaged one.
    """
    file = _File(path)
    name, family = _family(file)
    tree = {"architectures": [name], "model_type": family.model_type, **_config(file, family)}
    plan = _plan(file, family, tree)
    sizes = _sizes(file, plan)
    tokenizer, settings = vocabulary.build(file.get, path), _tokenizer_settings(file)
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(file, plan, sizes, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    weights.write_json(directory / "tokenizer_config.json", settings)
    if "chat_template" in settings:
        (directory / "chat_template.jinja").write_text(settings["chat_template"], encoding="utf-8")
    ids = _special_tokens(file)
    ends = {key: ids[key] for key in ("eos_token_id", "pad_token_id")}
    weights.write_json(directory / "generation_config.json", ends)
    weights.write_json(directory / "config.json", {**tree, **ids, "torch_dtype": "float32"})
    weights.flush(directory)


def _family(file: _File) -> tuple[str, Family]:
    """By architecture; DeepSeek-V2 and V3 share theirs, and differ in the gate."""
    gate = file.setting("expert_gating_func", int, gguf.ExpertGatingFuncType.SOFTMAX)
    for name, family in FAMILIES.items():
        if family.ggml == file.architecture and family.gate in (None, gate):
            return name, family
    raise LimbeckError(
        f"{file.path}: a gate of type {gate} is not supported; supported are softmax and sigmoid"
    )


def _config(file: _File, family: Family) -> dict[str, Any]:
    """`config.json` without the tokens."""
    tree = {
        key.theirs: file.setting(key.ggml, key.kind, key.default)
        if key.default is not None
        else file.size(key.ggml)
        for key in family.keys
    }
    if "token_embd.weight" not in file.tensors:
        raise LimbeckError(f"{file.path}: tensor token_embd.weight is missing; download the file again")
    tree["vocab_size"] = int(file.tensors["token_embd.weight"].shape[1])
    tree["tie_word_embeddings"] = "output.weight" not in file.tensors
    tree |= _latent(file, family) if family.latent else _heads(file, tree)
    theta = file.setting("rope.freq_base", float, 10_000.0)
    factors = file.dequantize(rope.FACTORS).numpy() if rope.FACTORS in file.tensors else None
    scaling = rope.scaling(file.setting, factors, theta, tree["head_dim"], str(file.path))
    if family.latent:
        tree.pop("head_dim")
    return {**family.wanted, **tree, "rope_theta": theta, "rope_scaling": scaling or None}


def _heads(file: _File, tree: dict[str, Any]) -> dict[str, int]:
    heads = tree["num_attention_heads"]
    head_dim = file.size("attention.key_length", tree["hidden_size"] // heads)
    partial = file.setting("rope.dimension_count", int, head_dim) != head_dim
    if partial or (file.setting("expert_count", int, 0) and "num_experts" not in tree):
        raise LimbeckError(
            f"{file.path}: partial rotary positions and experts are not supported in {file.architecture}; "
            "take a dense model"
        )
    return {"num_key_value_heads": file.size("attention.head_count_kv", heads), "head_dim": head_dim}


def _latent(file: _File, family: Family) -> dict[str, Any]:
    """MLA's sizes: llama.cpp keeps whole keys, position included, and counts one head for all in its cache."""
    positions, whole = file.size("rope.dimension_count"), file.size("attention.key_length_mla")
    if whole <= positions:
        raise LimbeckError(
            f"{file.path}: key {file.architecture}.attention.key_length_mla is damaged; download the file again"
        )
    groups = file.setting("expert_group_count", int, 1)
    limited = (
        {"topk_method": "group_limited_greedy"} if groups > 1 and family.model_type == "deepseek_v2" else {}
    )
    return {
        "num_key_value_heads": file.size("attention.head_count"),
        "head_dim": positions,
        "qk_rope_head_dim": positions,
        "qk_nope_head_dim": whole - positions,
        "v_head_dim": file.size("attention.value_length_mla"),
        "q_lora_rank": file.setting("attention.q_lora_rank", int, 0) or None,
        "n_group": groups,
        "topk_group": file.setting("expert_group_used_count", int, groups),
        **limited,
    }


def _plan(file: _File, family: Family, tree: dict[str, Any]) -> dict[str, tuple[Link, int]]:
    """Where each HuggingFace tensor comes from: a link and its place in it; all are there, and no others."""
    plan, known = {}, {rope.FACTORS}
    for link in links(family, tree):
        for name in link.ggml:
            if name not in file.tensors:
                raise LimbeckError(f"{file.path}: tensor {name} is missing; download the file again")
        known |= set(link.ggml)
        plan |= {name: (link, i) for i, name in enumerate(link.theirs)}
    if strange := sorted(set(file.tensors) - known):
        raise LimbeckError(
            f"{file.path}: tensor {strange[0]} has no place in {file.architecture}; it is another architecture"
        )
    return plan


def _sizes(file: _File, plan: dict[str, tuple[Link, int]]) -> dict[str, int]:
    """Bytes of each HuggingFace tensor in fp32."""
    sizes = {}
    for link in dict.fromkeys(link for link, _ in plan.values()):
        shapes = [tuple(map(int, reversed(file.tensors[name].shape))) for name in link.ggml]
        try:
            tensors = link.form.unpack([torch.empty(shape, device="meta") for shape in shapes])
            sizes |= {name: 4 * t.numel() for name, t in zip(link.theirs, tensors, strict=True)}
        except (RuntimeError, ValueError):
            raise LimbeckError(
                f"{file.path}: tensor {link.ggml[0]} is {shapes[0]}, which the sizes in the file do not divide; "
                "download it again"
            ) from None
    return sizes


def _write_weights(
    file: _File, plan: dict[str, tuple[Link, int]], sizes: dict[str, int], directory: Path
) -> None:
    @lru_cache(maxsize=1)  # the experts of a layer come out of one stack, one after another
    def unpacked(link: Link) -> list[Tensor]:
        return link.form.unpack([file.dequantize(name) for name in link.ggml])

    def fetch(name: str) -> Tensor:
        link, i = plan[name]
        return unpacked(link)[i].contiguous()

    weights.write(directory, sizes, fetch)


def _tokenizer_settings(file: _File) -> dict[str, Any]:
    tokens, ids = file.get("tokenizer.ggml.tokens", list), _special_tokens(file)
    template = file.get("tokenizer.chat_template", str, "")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key.removesuffix("_id"): None if i is None else tokens[i] for key, i in ids.items()},
        "model_max_length": file.size("context_length"),
        "clean_up_tokenization_spaces": False,
        **({"chat_template": template} if template else {}),
    }


def _special_tokens(file: _File) -> dict[str, int | None]:
    end = vocabulary.special_token(file.get, "eos", file.path)
    return {
        "bos_token_id": vocabulary.special_token(file.get, "bos", file.path, None),
        "eos_token_id": end,
        "pad_token_id": vocabulary.special_token(file.get, "padding", file.path, end),
    }
