"""HuggingFace directories in and out, and the digest of a model's weights.

The name map is data: each of our modules is one or more of theirs, stacked by rows. Reading holds one
tensor beside the model; writing, one file's worth.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..tokenizer import Tokenizer
from ..types import LimbeckError
from .config import ModelConfig
from .decoder import Decoder

STACKED = {
    "embed": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
    "blocks.{}.attention_norm": ("model.layers.{}.input_layernorm",),
    "blocks.{}.attention.qkv": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "blocks.{}.attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "blocks.{}.attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
    "blocks.{}.attention.out": ("model.layers.{}.self_attn.o_proj",),
    "blocks.{}.ffn_norm": ("model.layers.{}.post_attention_layernorm",),
    "blocks.{}.ffn.gate_up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "blocks.{}.ffn.down": ("model.layers.{}.mlp.down_proj",),
}

# Old checkpoints carry the rotary frequencies, which follow from config.json.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")

SHARD_BYTES = 4 * 1024**3

# Embeddings are padded so that matrices divide well (Qwen: up to 399 rows); more is another tokenizer's.
SPARE_ROWS = 1024


@dataclass(frozen=True)
class Part:
    """Rows `begin` to `end` of our tensor are all of one of theirs.

    `Part("model.layers.0.self_attn.k_proj.weight", "blocks.0.attention.qkv.weight", begin=64, end=96)`
    """

    theirs: str
    ours: str
    begin: int
    end: int


def parts(decoder: Decoder) -> Iterator[Part]:
    """Which rows of which of our weights each HuggingFace tensor is, in the order of our layers."""
    heights = decoder.config.fused
    for name, weight in decoder.named_parameters():
        module, kind = name.rsplit(".", 1)
        layer = "".join(re.findall(r"blocks\.(\d+)", module))
        begin = 0
        sources = STACKED[re.sub(r"\d+", "{}", module, count=1)]
        for source, rows in zip(sources, heights.get(module.rsplit(".", 1)[-1], (len(weight),)), strict=True):
            yield Part(f"{source.format(layer)}.{kind}", name, begin, begin + rows)
            begin += rows


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Read a HuggingFace directory. Every tensor must be there, in its shape, and none that has no place.

    Raises LimbeckError, naming file and remedy, for whatever is missing, truncated or of another model.
    """
    config = ModelConfig.from_directory(directory)
    check_vocabulary(config, directory / "tokenizer.json")
    with _Unfilled():
        decoder = Decoder(config)
    _fill(decoder.to(dtype), directory)
    return decoder


class _Unfilled(TorchFunctionMode):
    """Modules made inside keep memory as it came: drawing weights that are then overwritten takes seconds."""

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def check_vocabulary(config: ModelConfig, path: Path) -> None:
    """Refuse a `tokenizer.json` that cannot be this model's; none there is no mistake."""
    if not path.exists():
        return
    try:
        size = max(tokenizers.Tokenizer.from_file(str(path)).get_vocab().values(), default=-1) + 1
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for a file it cannot read
        raise LimbeckError(
            f"{path}: not a tokenizer ({error}); copy it again from the model's source"
        ) from None
    if not size <= config.vocab_size <= size + SPARE_ROWS:
        raise LimbeckError(
            f"{path}: {size} tokens, but config.json says vocab_size = {config.vocab_size}; "
            "copy the tokenizer that belongs to this model"
        )


@torch.no_grad()
def _fill(decoder: Decoder, directory: Path) -> None:
    weights = dict(decoder.named_parameters())
    wanted = {part.theirs: part for part in parts(decoder)}
    missing = set(wanted)
    for path in _files(directory):
        with _open(path) as file:
            names = file.keys()
            for name in names:
                if name in wanted:
                    _copy(file.get_tensor(name), weights[wanted[name].ours], wanted[name], path)
                    missing.discard(name)
                elif name == "lm_head.weight":
                    _expect_tied(file.get_tensor(name), directory, path)
                elif not HARMLESS.search(name):
                    raise LimbeckError(
                        f"{path}: tensor {name} has no place in this architecture; check config.json"
                    )
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise LimbeckError(
            f"{directory}: {len(missing)} tensors are missing ({some}); copy the weights again"
        )


def _copy(tensor: Tensor, weight: Tensor, part: Part, path: Path) -> None:
    place = weight[part.begin : part.end]
    if tensor.shape != place.shape:
        raise LimbeckError(
            f"{path}: {part.theirs} is {tuple(tensor.shape)}, config.json asks for {tuple(place.shape)}; "
            "the two are of different models"
        )
    place.copy_(tensor)


def _expect_tied(head: Tensor, directory: Path, path: Path) -> None:
    """A tied model may carry its head a second time, but not a different one."""
    for other in _files(directory):
        with _open(other) as file:
            held = set(file.keys()) & {"model.embed_tokens.weight"}
            if any(torch.equal(head, file.get_tensor(name)) for name in held):
                return
    raise LimbeckError(
        f"{path}: lm_head.weight differs from the embedding, though config.json ties them; "
        "set tie_word_embeddings to false"
    )


def _files(directory: Path) -> list[Path]:
    """The weight files: those of the index if there is one, else `model.safetensors`."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise LimbeckError(f"{index}: not a weight index; copy it again from the model's source") from None
    return [directory / name for name in sorted(names)]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise LimbeckError(f"{path} is missing; weights are read from safetensors files only") from None
    except (SafetensorError, OSError) as error:
        raise LimbeckError(
            f"{path}: truncated or damaged ({error}); copy it again from the model's source"
        ) from None


def save(decoder: Decoder, directory: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a directory that transformers loads with equal logits; the same weights give the same bytes.

    `model.safetensors` or shards, `config.json`, `generation_config.json`, and the tokenizer's files. Returns
    when all of it is on the disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = dict(decoder.named_parameters())
    place = {part.theirs: part for part in parts(decoder)}

    def slice_of(name: str) -> Tensor:
        part = place[name]
        return weights[part.ours].detach()[part.begin : part.end].cpu().contiguous()

    row = {name: weight[0].numel() * weight.element_size() for name, weight in weights.items()}
    sizes = {name: (part.end - part.begin) * row[part.ours] for name, part in place.items()}
    write(directory, sizes, slice_of)
    ends = (tokenizer.end_id, tokenizer.pad_id) if tokenizer else (None, None)
    dtype = str(decoder.embed.weight.dtype).removeprefix("torch.")
    write_json(directory / "config.json", {**decoder.config.to_hf(*ends), "torch_dtype": dtype})
    write_json(directory / "generation_config.json", {"eos_token_id": ends[0], "pad_token_id": ends[1]})
    if tokenizer:
        tokenizer.save(directory)
    flush(directory)


def write(directory: Path, sizes: Mapping[str, int], fetch: Callable[[str], Tensor]) -> None:
    """Write tensors, fetched by name as they are needed, in files of at most `SHARD_BYTES`."""
    shards = _shards(sizes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        tree = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(index.items()))}
        write_json(directory / "model.safetensors.index.json", tree)
    for name, shard in zip(names, shards, strict=True):
        save_file({tensor: fetch(tensor) for tensor in shard}, directory / name, metadata={"format": "pt"})
        (directory / name).chmod(0o644)  # safetensors leaves it to its owner alone


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def flush(directory: Path) -> None:
    """Return when every file of a directory, and its list of files, is on the disk."""
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def digest(decoder: Decoder) -> str:
    """SHA-256 of all weights in the order of their names: two models are the same if and only if this is.

    Each weight is hashed by itself, so that cores share the work.
    """
    named = sorted(decoder.named_parameters())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = list(pool.map(_digest, (weight for _, weight in named)))
    whole = hashlib.sha256()
    for (name, weight), one in zip(named, digests, strict=True):
        whole.update(f"{name} {weight.dtype} {tuple(weight.shape)} {one}\n".encode())
    return whole.hexdigest()


def _digest(weight: Tensor) -> str:
    raw = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(raw).cast("B")).hexdigest()
