"""Reading and writing HuggingFace model directories, and the digest of a model's weights.

The names are data (families.py): each of our parameters consists of one or more HuggingFace tensors, stacked
along the rows. Reading holds one tensor in memory beside the model; writing holds the tensors of one file. X
rows of a weight · Y its columns.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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

from ..activity import track
from ..files import sync
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError
from .config import ModelConfig
from .decoder import Decoder
from .families import FAMILIES
from .ops import devices, place

# Old checkpoints carry the rotary frequencies, which follow from config.json; modules of multi-token
# prediction carry the model's own embedding and head a second time.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|layers\.\d+\.(embed_tokens|shared_head\.head)\.weight$")

FP8_BLOCK = 128  # rows and columns of a checkpoint in FP8 that share one scale

SHARD_BYTES = 4 * 1024**3  # bytes of one weight file at most

# Embeddings are padded so that matrices divide well (Qwen: up to 399 rows); more is another tokenizer's.
SPARE_ROWS = 1024  # rows

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
PAIRED = (".q_proj", ".q_b_proj", ".kv_a_proj_with_mqa")  # rotary rows in pairs in checkpoints of DeepSeek


@dataclass(frozen=True)
class Part:
    """Rows `begin` to `end` of one of our parameters, which hold exactly one HuggingFace tensor.

    `Part("model.layers.0.self_attn.k_proj.weight", "blocks.0.attention.qkv.weight", begin=64, end=96)` says
    that rows 64 to 95 of our stacked projection are the tensor of the keys. `theirs` is the name of the
    HuggingFace tensor, `ours` that of our parameter. Rows are counted over all matrices of a stack of
    experts. If `order` is given, row i of our rows is row `order[i]` of the HuggingFace tensor.
    """

    theirs: str
    ours: str
    begin: int
    end: int
    order: Tensor | None = None

    def place(self, weight: Tensor) -> Tensor:
        """Return the rows [X, Y] of this part in our parameter `weight`, as a view and not a copy."""
        rows = weight.flatten(0, -2) if weight.ndim > 1 else weight
        return rows[self.begin : self.end]


def parts(decoder: Decoder) -> Iterator[Part]:
    """Yield a `Part` for every HuggingFace tensor of the model, in the order of our layers."""
    config = decoder.config
    names = FAMILIES[config.family].names
    for name, weight in decoder.named_parameters():
        stem, layer = _split_layer(name, config.layers)
        module, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", stem).groups()
        sources = _each_expert(names[module], config)
        begin = 0
        for source, height in zip(sources, _heights(config, name, weight, len(sources)), strict=True):
            theirs = source.format(layer=layer) + (suffix or "")
            yield Part(theirs, name, begin, begin + height, _order(config, source))
            begin += height


def _split_layer(name: str, layers: int) -> tuple[str, int]:
    """Return a parameter's name without its layer, and the index of the layer.

    `blocks.3.attention.out.weight` gives `attention.out.weight` and 3. The modules of multi-token prediction
    (`ahead`) have the indices after the last of the `layers` layers. Parameters outside of layers have 0.
    """
    match = re.match(r"(?:blocks\.(\d+)|ahead\.(\d+)(?:\.block)?)\.(.*)", name)
    if not match:
        return name, 0
    block, depth, rest = match.groups()
    return rest, int(block) if block else layers + int(depth)


def _each_expert(sources: tuple[str, ...], config: ModelConfig) -> list[str]:
    """Return the HuggingFace names of one module, repeated for every expert if they contain its number."""
    if "{expert}" not in sources[0]:
        return list(sources)
    experts = map(str, range(config.experts.count))
    return [source.replace("{expert}", expert) for expert in experts for source in sources]


def _heights(config: ModelConfig, name: str, weight: Tensor, sources: int) -> tuple[int, ...]:
    """Return the number of rows of each of the `sources` tensors that are stacked in a weight [..., X, Y]."""
    stacked = config.matrices(name) if sources > 1 else None
    if stacked:
        return stacked
    return (weight.numel() // weight.shape[-1] if weight.ndim > 1 else len(weight),)


def _order(config: ModelConfig, source: str) -> Tensor | None:
    """Return, for each of our rows, the index of the row in the HuggingFace tensor `source`, [X].

    Checkpoints of DeepSeek store rotary dimensions as neighbouring pairs, our weights as two halves. Returns
    None where the order is the same.
    """
    latent = config.latent
    if latent is None or not latent.interleaved or not source.endswith(PAIRED):
        return None
    halves = torch.arange(latent.rope_dim).view(-1, 2).T.flatten()
    if source.endswith(".kv_a_proj_with_mqa"):
        return torch.cat([torch.arange(latent.kv_rank), latent.kv_rank + halves])
    head = torch.cat([torch.arange(latent.nope_dim), latent.nope_dim + halves])
    heads = torch.arange(config.heads).unsqueeze(1)
    return (heads * len(head) + head).flatten()


# ---------------------------------------------------------------- reading


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the model of a HuggingFace directory.

    Every tensor of the architecture must be there, in its shape, and no tensor may be left over.

    Raises:
        LimbeckError: a tensor is missing, truncated or belongs to another model. The message names the
            file and the remedy.
    """
    config = ModelConfig.from_directory(directory)
    check_vocabulary(config, directory / "tokenizer.json")
    with _WithoutInit():
        decoder = Decoder(config)
    fill(decoder.to(dtype), directory)
    return decoder


def load_onto(directory: Path, device: str) -> Decoder:
    """Read a decoder for inference onto a device, by its resolved name (ops/devices.py). A card computes in
    bfloat16 where the weights are stored so, every other device in float32."""
    dtype = stored_dtype(directory) if devices.is_card(device) else torch.float32
    return place(load(directory, dtype), device)


def stored_dtype(directory: Path) -> torch.dtype:
    """Return bfloat16 if the config.json of a model directory says that the weights are stored so, else
    float32."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    stored = settings.get("torch_dtype") or settings.get("dtype")
    return torch.bfloat16 if stored == "bfloat16" else torch.float32


class _WithoutInit(TorchFunctionMode):
    """Skip the initialisation of modules, which takes seconds, as their weights are overwritten anyway."""

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def check_vocabulary(config: ModelConfig, path: Path) -> None:
    """Refuse a `tokenizer.json` at `path` that does not fit the model; a missing file is accepted.

    Raises:
        LimbeckError: the file is damaged, or has another number of tokens than the model.
    """
    if not path.exists():
        return
    try:
        vocabulary = tokenizers.Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for a file it cannot read
        raise LimbeckError(
            f"{path}: not a tokenizer ({error}); copy it again from the model's source"
        ) from None
    size = max(vocabulary.values(), default=-1) + 1
    if not size <= config.vocab_size <= size + SPARE_ROWS:
        raise LimbeckError(
            f"{path}: {size} tokens, but config.json says vocab_size = {config.vocab_size}; "
            "copy the tokenizer that belongs to this model"
        )


@torch.no_grad()
def fill(decoder: Decoder, directory: Path) -> None:
    """Read every weight of `decoder` from the files of `directory`, in place. Raises LimbeckError as `load`
    does; the weights are then partly those from before."""
    weights = dict(decoder.named_parameters())
    wanted = {part.theirs: part for part in parts(decoder)}
    missing = set(wanted)
    for path, listed in track(list(_files(directory).items()), "loading the model", "files"):
        with _open(path) as file:
            names = set(file.keys())
            _check_index(directory, path, listed - names)
            for name in track(sorted(names), "", "tensors"):
                if name in wanted:
                    part = wanted[name]
                    _copy(_tensor(file, name, names, directory), weights[part.ours], part, path)
                elif name.removesuffix("_scale_inv") not in wanted:
                    _check_extra(decoder, file, name, path)
        missing -= names
    missing = _drop_missing_ahead(decoder, wanted, missing)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise LimbeckError(
            f"{directory}: {len(missing)} tensors are missing ({some}); copy the weights again"
        )


def _check_extra(decoder: Decoder, file: Any, name: str, path: Path) -> None:
    """Refuse the tensor `name`, which belongs to none of our weights, unless it repeats one of them.

    `file` is the open file at `path`.
    """
    names = FAMILIES[decoder.config.family].names
    head = f"{names['head'][0]}.weight"
    if name == head:
        _expect_tied(file.get_tensor(name), f"{names['embed'][0]}.weight", path)
    elif not HARMLESS.search(name):
        raise LimbeckError(f"{path}: tensor {name} has no place in this architecture; check config.json")


def _drop_missing_ahead(decoder: Decoder, wanted: Mapping[str, Part], missing: set[str]) -> set[str]:
    """Remove the modules of multi-token prediction (MTP) from `decoder` if all their weights are missing.

    transformers saves a model without these modules, but with a config.json that still lists them. `wanted`
    are the parts by HuggingFace name, `missing` the names that no file has. Returns the names that are still
    missing afterwards.
    """
    ahead = {part.theirs for part in wanted.values() if part.ours.startswith("ahead.")}
    if not ahead or not ahead <= missing:
        return missing
    decoder.ahead = torch.nn.ModuleList()
    decoder.config = replace(decoder.config, predicted=0)
    return missing - ahead


def _copy(tensor: Tensor, weight: Tensor, part: Part, path: Path) -> None:
    """Copy a HuggingFace tensor [X, Y] into the rows of our `weight` that `part` names.

    `path` is the tensor's file, for errors.
    """
    place = part.place(weight)
    if tensor.shape != place.shape:
        raise LimbeckError(
            f"{path}: {part.theirs} is {tuple(tensor.shape)}, config.json asks for {tuple(place.shape)}; "
            "the two are of different models"
        )
    place.copy_(tensor if part.order is None else tensor[part.order])


def _tensor(file: Any, name: str, names: set[str], directory: Path) -> Tensor:
    """Return one tensor [X, Y]; FP8 weights are multiplied with the scales of their blocks.

    See arXiv 2412.19437, section 3.3.2. `names` are the tensors of the open `file`; a scale that is not among
    them is searched for in the other files of `directory`.
    """
    tensor = file.get_tensor(name)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    scale = f"{name}_scale_inv"
    scales = file.get_tensor(scale) if scale in names else _find(_files(directory), scale)
    if scales is None or scales.shape != tuple(-(-size // FP8_BLOCK) for size in tensor.shape):
        raise LimbeckError(
            f"{directory}: {name} is in FP8, but {scale} is missing or of another size; "
            "copy the weights again"
        )
    wide = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return tensor.float() * wide[: tensor.shape[0], : tensor.shape[1]]


def _find(paths: Iterable[Path], name: str) -> Tensor | None:
    """Return the tensor [X, Y] called `name` from the first file that has it, or None."""
    for path in paths:
        with _open(path) as file:
            if name in file.keys():  # noqa: SIM118 - not a dict
                return file.get_tensor(name)
    return None


def _expect_tied(head: Tensor, embedding: str, path: Path) -> None:
    """Refuse an output head [X, Y] that differs from the embedding, although config.json says they are tied.

    `embedding` is the name of the embedding's tensor, `path` the file of the head.
    """
    for other in _files(path.parent):
        tensor = _find([other], embedding)
        if tensor is not None and torch.equal(head, tensor):
            return
    raise LimbeckError(
        f"{path}: lm_head.weight differs from the embedding, though config.json ties them; "
        "set tie_word_embeddings to false"
    )


def _files(directory: Path) -> dict[Path, set[str]]:
    """Return a directory's weight files, each with the names of the tensors that the index lists for it."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return {_single_file(directory): set()}
    files: dict[Path, set[str]] = {}
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for tensor, name in places.items():
            files.setdefault(directory / Path(name).name, set()).add(tensor)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise LimbeckError(f"{index}: not a weight index; copy it again from the model's source") from None
    return dict(sorted(files.items()))


def _single_file(directory: Path) -> Path:
    """Return the path of the weight file of a directory that has no index.

    The file may be missing. Raises LimbeckError if there is a pickle in its place.
    """
    single = directory / "model.safetensors"
    if single.exists():
        return single
    pickles = [path for pattern in PICKLES for path in sorted(directory.glob(pattern))]
    if pickles:
        raise LimbeckError(
            f"{pickles[0]} is a pickle, which can run any code and is never read; "
            "take the model's safetensors files"
        )
    return single


def _check_index(directory: Path, path: Path, absent: set[str]) -> None:
    """Refuse an index that lists tensors for the file `path` that the file does not hold (`absent`)."""
    if absent:
        raise LimbeckError(
            f"{directory / 'model.safetensors.index.json'}: {min(absent)} is said to be in {path.name}, "
            "which does not hold it; copy the weights again"
        )


def _open(path: Path) -> Any:
    """Return an open safetensors file."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise LimbeckError(f"{path} is missing; weights are read from safetensors files only") from None
    except (SafetensorError, OSError) as error:
        raise LimbeckError(
            f"{path}: truncated or damaged ({error}); copy it again from the model's source"
        ) from None


# ---------------------------------------------------------------- writing


def save(decoder: Decoder, directory: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a model directory that transformers loads with equal logits; equal weights give equal bytes.

    The directory gets `model.safetensors` or several shards, `config.json`, `generation_config.json` and, if
    a tokenizer is given, its files. Returns when all files are flushed to the disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = dict(decoder.named_parameters())
    sources = {part.theirs: part for part in parts(decoder)}

    def fetch(name: str) -> Tensor:
        """Return the HuggingFace tensor `name` [X, Y], made from our weights."""
        part = sources[name]
        rows = part.place(weights[part.ours].detach())
        if part.order is not None:
            rows = rows[part.order.argsort()]
        return rows.cpu().contiguous()

    sizes = {}
    for name, part in sources.items():
        rows = part.place(weights[part.ours])
        sizes[name] = rows.numel() * rows.element_size()
    write(directory, sizes, fetch)
    _write_settings(decoder, directory, tokenizer)
    flush(directory)


def _write_settings(decoder: Decoder, directory: Path, tokenizer: Tokenizer | None) -> None:
    """Write the files of a model directory that are not weights: configurations and the tokenizer."""
    eos = tokenizer.end_id if tokenizer else None
    pad = tokenizer.pad_id if tokenizer else None
    dtype = str(decoder.embed.weight.dtype).removeprefix("torch.")
    write_json(directory / "config.json", {**decoder.config.to_hf(eos, pad), "torch_dtype": dtype})
    write_json(directory / "generation_config.json", {"eos_token_id": eos, "pad_token_id": pad})
    if tokenizer:
        tokenizer.save(directory)


def write(directory: Path, sizes: Mapping[str, int], fetch: Callable[[str], Tensor]) -> None:
    """Write tensors [X, Y] to safetensors files of at most `SHARD_BYTES` each; several get an index.

    `sizes` are the bytes of each tensor, by name. `fetch` is called with a name when its tensor is needed.
    """
    shards = _shards(sizes)
    count = len(shards)
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = {"total_size": sum(sizes.values())}
        tree = {"metadata": total, "weight_map": dict(sorted(index.items()))}
        write_json(directory / "model.safetensors.index.json", tree)
    shards_by_name = list(zip(names, shards, strict=True))
    for name, shard in track(shards_by_name, "saving the model", "files"):
        path = directory / name
        save_file({tensor: fetch(tensor) for tensor in shard}, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable for its owner alone


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Return the names of the tensors in groups whose sizes in bytes add up to at most `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write `tree` to the file `path` as indented JSON."""
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def flush(directory: Path) -> None:
    """Return when a directory's files, and its own entries, are flushed to the disk (fsync)."""
    for path in (*directory.iterdir(), directory):
        sync(path)


# ---------------------------------------------------------------- digest


def digest(decoder: Decoder) -> str:
    """Return the SHA-256 of all weights with their names, types and shapes, in the order of the names.

    Two models have the same digest only if these are equal. Each weight is hashed separately, so that several
    threads share the work.
    """
    weights = dict(sorted(decoder.named_parameters()))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = list(pool.map(_digest, weights.values()))
    whole = hashlib.sha256()
    for (name, weight), part in zip(weights.items(), digests, strict=True):
        whole.update(f"{name} {weight.dtype} {tuple(weight.shape)} {part}\n".encode())
    return whole.hexdigest()


def _digest(weight: Tensor) -> str:
    """Return the SHA-256 of the bytes of a weight of any shape [...]."""
    raw = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(raw).cast("B")).hexdigest()
