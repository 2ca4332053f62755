"""HuggingFace directories in and out, and the digest of a model's weights.

The name map is data (families.py): each of our modules is one or more of theirs, stacked by rows. Reading
holds one tensor beside the model; writing, one file's worth.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..text.tokenizer import Tokenizer
from ..types import LimbeckError
from .config import ModelConfig
from .decoder import Decoder
from .families import FAMILIES

# Old checkpoints carry the rotary frequencies, which follow from config.json; modules that look ahead carry
# the model's own embedding and head a second time.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")

FP8_BLOCK = 128  # a DeepSeek checkpoint in FP8 has one scale for each 128 x 128 weights

SHARD_BYTES = 4 * 1024**3

# Embeddings are padded so that matrices divide well (Qwen: up to 399 rows); more is another tokenizer's.
SPARE_ROWS = 1024


@dataclass(frozen=True)
class Part:
    """Rows `begin` to `end` of our tensor are all of one of theirs; a stack of matrices counts as one tall matrix.

    `Part("model.layers.0.self_attn.k_proj.weight", "blocks.0.attention.qkv.weight", begin=64, end=96)`;
    `order`, where given, is which of their rows each of ours is.
    """

    theirs: str
    ours: str
    begin: int
    end: int
    order: Tensor | None = None

    def place(self, weight: Tensor) -> Tensor:
        """The part's own rows of our tensor, not a copy."""
        return (weight.flatten(0, -2) if weight.ndim > 1 else weight)[self.begin : self.end]


def parts(decoder: Decoder) -> Iterator[Part]:
    """Which rows of which of our weights each HuggingFace tensor is, in the order of our layers."""
    config, names = decoder.config, FAMILIES[decoder.config.family].names
    for name, weight in decoder.named_parameters():
        stem, layer = _place(name, config.layers)
        module, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", stem).groups()
        sources = names[module]
        if "{expert}" in sources[0]:
            sources = [
                source.replace("{expert}", str(e)) for e in range(config.experts.count) for source in sources
            ]
        heights = config.matrices(name) if len(sources) > 1 else None
        heights = heights or (weight.numel() // weight.shape[-1] if weight.ndim > 1 else len(weight),)
        begin = 0
        for source, height in zip(sources, heights, strict=True):
            yield Part(
                source.format(layer=layer) + (suffix or ""),
                name,
                begin,
                begin + height,
                _order(config, source),
            )
            begin += height


def _place(name: str, layers: int) -> tuple[str, int]:
    """`blocks.3.attention.out.weight` is `attention.out.weight` of layer 3; modules that look ahead come after."""
    found = re.match(r"(?:blocks\.(\d+)|ahead\.(\d+)(?:\.block)?)\.(.*)", name)
    if not found:
        return name, 0
    block, depth, rest = found.groups()
    return rest, int(block) if block else layers + int(depth)


def _order(config: ModelConfig, source: str) -> Tensor | None:
    """Checkpoints of DeepSeek's lay rotary dimensions out in pairs, we in halves."""
    latent = config.latent
    if (
        latent is None
        or not latent.interleaved
        or not source.endswith((".q_proj", ".q_b_proj", ".kv_a_proj_with_mqa"))
    ):
        return None
    halves = torch.arange(latent.rope_dim).view(-1, 2).T.flatten()
    if source.endswith(".kv_a_proj_with_mqa"):
        return torch.cat([torch.arange(latent.kv_rank), latent.kv_rank + halves])
    head = torch.cat([torch.arange(latent.nope_dim), latent.nope_dim + halves])
    return (torch.arange(config.heads).unsqueeze(1) * len(head) + head).flatten()


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
    names = FAMILIES[decoder.config.family].names
    head, embedding = (f"{names[kind][0]}.weight" for kind in ("head", "embed"))
    missing = set(wanted)
    for path, listed in _files(directory).items():
        with _open(path) as file:
            held = set(file.keys())
            _check_index(directory, path, listed - held)
            for name in sorted(held):
                if name in wanted:
                    part = wanted[name]
                    _copy(_tensor(file, name, held, directory), weights[part.ours], part, path)
                    missing.discard(name)
                elif name == head:
                    _expect_tied(file.get_tensor(name), embedding, directory, path)
                elif not HARMLESS.search(name) and name.removesuffix("_scale_inv") not in wanted:
                    raise LimbeckError(
                        f"{path}: tensor {name} has no place in this architecture; check config.json"
                    )
    ahead = {part.theirs for part in wanted.values() if part.ours.startswith("ahead.")}
    if (
        ahead and ahead <= missing
    ):  # transformers drops what looks ahead, and config.json goes on announcing it
        missing -= ahead
        decoder.ahead, decoder.config = torch.nn.ModuleList(), replace(decoder.config, predicted=0)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise LimbeckError(
            f"{directory}: {len(missing)} tensors are missing ({some}); copy the weights again"
        )


def _copy(tensor: Tensor, weight: Tensor, part: Part, path: Path) -> None:
    place = part.place(weight)
    if tensor.shape != place.shape:
        raise LimbeckError(
            f"{path}: {part.theirs} is {tuple(tensor.shape)}, config.json asks for {tuple(place.shape)}; "
            "the two are of different models"
        )
    place.copy_(tensor if part.order is None else tensor[part.order])


def _tensor(file: Any, name: str, held: set[str], directory: Path) -> Tensor:
    """One tensor as it is meant: FP8 weights are multiplied by their blocks' scales (arXiv 2412.19437, 3.3.2)."""
    tensor = file.get_tensor(name)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    scale = f"{name}_scale_inv"
    if scale in held:
        scales = file.get_tensor(scale)
    else:
        scales = next(
            (found for path in _files(directory) if (found := _find(path, scale)) is not None), None
        )
    if scales is None or scales.shape != tuple(-(-size // FP8_BLOCK) for size in tensor.shape):
        raise LimbeckError(
            f"{directory}: {name} is in FP8, but {scale} is missing or of another size; copy the weights again"
        )
    wide = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return tensor.float() * wide[: tensor.shape[0], : tensor.shape[1]]


def _find(path: Path, name: str) -> Tensor | None:
    with _open(path) as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 - not a dict


def _expect_tied(head: Tensor, embedding: str, directory: Path, path: Path) -> None:
    """A tied model may carry its head a second time, but not a different one."""
    if any(
        (found := _find(other, embedding)) is not None and torch.equal(head, found)
        for other in _files(directory)
    ):
        return
    raise LimbeckError(
        f"{path}: lm_head.weight differs from the embedding, though config.json ties them; "
        "set tie_word_embeddings to false"
    )


def _files(directory: Path) -> dict[Path, set[str]]:
    """The weight files and the tensors listed for each: those of the index if there is one, else one file."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = directory / "model.safetensors"
        pickled = [
            path for kind in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in sorted(directory.glob(kind))
        ]
        if not single.exists() and pickled:
            raise LimbeckError(
                f"{pickled[0]} is a pickle, which can run any code and is never read; "
                "take the model's safetensors files"
            )
        return {single: set()}
    files: dict[Path, set[str]] = {}
    try:
        for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(directory / Path(name).name, set()).add(tensor)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise LimbeckError(f"{index}: not a weight index; copy it again from the model's source") from None
    return dict(sorted(files.items()))


def _check_index(directory: Path, path: Path, absent: set[str]) -> None:
    if absent:
        raise LimbeckError(
            f"{directory / 'model.safetensors.index.json'}: {min(absent)} is said to be in {path.name}, "
            "which does not hold it; copy the weights again"
        )


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
        rows = part.place(weights[part.ours].detach())
        return (rows if part.order is None else rows[part.order.argsort()]).cpu().contiguous()

    sizes = {
        name: part.place(w := weights[part.ours]).numel() * w.element_size() for name, part in place.items()
    }
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
