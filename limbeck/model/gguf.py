"""A GGUF file becomes a HuggingFace directory: weights dequantised to fp32, tokenizer and template rebuilt.

llama.cpp keeps a tokenizer as lists and the name of a splitting rule; what each name means is data here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from ..types import LimbeckError
from . import weights
from .config import FAMILIES, ModelConfig

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}

# Frequencies of Llama 3.1's stretched positions; a property of config.json elsewhere.
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Splitting:
    """How text is cut before byte-pair merging: `Splitting(digits=3)` is Llama 3's, three digits to a piece.

    `digits` 0 is GPT-2's own rule; `single_digits` puts a cut round each digit before that rule.
    """

    digits: int = 0
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    begins: bool = False


LLAMA3 = Splitting(digits=3, whole_words=True, begins=True)
QWEN2 = Splitting(digits=1, nfc=True)
SPLITTINGS = {
    "default": Splitting(),
    "gpt-2": Splitting(),
    "gpt2": Splitting(),
    "smollm": Splitting(single_digits=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}

CONTROL, USER_DEFINED, UNUSED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED


class _File:
    """An open GGUF: its path, its keys and its tensors by name."""

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except FileNotFoundError:
            raise LimbeckError(f"{path} is missing; give the path of a GGUF file") from None
        except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
            raise LimbeckError(
                f"{path}: not a GGUF file, or truncated ({error}); download it again"
            ) from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.architecture = self.get("general.architecture")
        if self.architecture not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise LimbeckError(
                f"{path}: architecture {self.architecture} is not supported; supported are {known}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self._fields[key].contents() if key in self._fields else default
        except UnicodeDecodeError:
            raise LimbeckError(f"{self.path}: key {key} is damaged; download the file again") from None

    def need(self, key: str) -> Any:
        if key not in self._fields:
            raise LimbeckError(f"{self.path}: key {key} is missing; download the file again")
        return self.get(key)

    def setting(self, key: str, default: Any = None) -> Any:
        return self.get(f"{self.architecture}.{key}", default)


def convert(path: Path, directory: Path) -> None:
    """Write `directory` so that `weights.load`, `Tokenizer.from_directory` and transformers read it.

    Llama, Qwen2 and Qwen3 with a byte-pair tokenizer, in whatever quantisation the gguf package can undo.
    Raises LimbeckError for any other file and for a truncated one.
    """
    file = _File(path)
    config = _config(file)
    tokenizer, settings = _tokenizer(file), _tokenizer_settings(file)
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(file, config, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    weights.write_json(directory / "tokenizer_config.json", settings)
    if "chat_template" in settings:
        (directory / "chat_template.jinja").write_text(settings["chat_template"], encoding="utf-8")
    end = file.need("tokenizer.ggml.eos_token_id")
    pad = file.get("tokenizer.ggml.padding_token_id", end)
    weights.write_json(directory / "generation_config.json", {"eos_token_id": end, "pad_token_id": pad})
    start = file.get("tokenizer.ggml.bos_token_id")
    weights.write_json(directory / "config.json", {**config.to_hf(end, pad), "bos_token_id": start})
    weights.flush(directory)


def _config(file: _File) -> ModelConfig:
    family = FAMILIES[file.architecture]
    heads, hidden = _size(file, "attention.head_count"), _size(file, "embedding_length")
    head_dim = file.setting("attention.key_length", hidden // heads)
    if file.setting("rope.dimension_count", head_dim) != head_dim or file.setting("expert_count", 0):
        raise LimbeckError(
            f"{file.path}: partial rotary positions and experts are not supported; take a dense model"
        )
    if "token_embd.weight" not in file.tensors:
        raise LimbeckError(f"{file.path}: tensor token_embd.weight is missing; download the file again")
    theta = _short(file.setting("rope.freq_base", 10_000.0))
    return ModelConfig(
        family=file.architecture,
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        layers=_size(file, "block_count"),
        heads=heads,
        kv_heads=file.setting("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=_size(file, "feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, theta, head_dim),
        norm_eps=_short(file.setting("attention.layer_norm_rms_epsilon", 1e-6)),
        tied="output.weight" not in file.tensors,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_positions=_size(file, "context_length"),
    )


def _size(file: _File, key: str) -> int:
    value = file.need(f"{file.architecture}.{key}")
    if not isinstance(value, int) or value < 1:
        raise LimbeckError(
            f"{file.path}: {file.architecture}.{key} = {value} is not supported; one number is needed"
        )
    return value


def _short(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where the file's bits say 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: _File, theta: float, head_dim: int) -> dict[str, Any]:
    """Linear scaling by its key; Llama 3.1's by its factors, of which the file keeps only the outcome."""
    kind = file.setting("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.setting("rope.scaling.factor", 1.0)}
    if kind != "none":
        raise LimbeckError(
            f"{file.path}: rope scaling of type {kind} is not supported; supported are linear, llama3"
        )
    if ROPE_FACTORS not in file.tensors:
        return {}
    found = _dequantize(file, ROPE_FACTORS).numpy()
    scaling = {
        "rope_type": "llama3",
        "factor": float(found.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(found, _llama3_factors(theta, head_dim, scaling), rtol=1e-3):
        raise LimbeckError(
            f"{file.path}: its rope factors are not Llama 3.1's; take the model's HuggingFace directory"
        )
    return scaling


def _llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    frequency = theta ** -(np.arange(head_dim // 2) / (head_dim // 2))
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (blend + (1 - blend) / scaling["factor"])


def _write_weights(file: _File, config: ModelConfig, directory: Path) -> None:
    sources = {_name(file, name): name for name in file.tensors if name != ROPE_FACTORS}
    sizes = {theirs: 4 * int(file.tensors[name].n_elements) for theirs, name in sources.items()}
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads} if file.architecture == "llama" else {}

    def fetch(theirs: str) -> Tensor:
        tensor = _dequantize(file, sources[theirs])
        rotated = heads.get(theirs.split(".")[-2])
        return _half_split(tensor, rotated) if rotated else tensor

    weights.write(directory, sizes, fetch)


def _name(file: _File, name: str) -> str:
    module, kind = name.rsplit(".", 1) if "." in name else (name, "")
    layer = module.split(".")[1] if module.startswith("blk.") else ""
    pattern = module.replace(f"blk.{layer}.", "blk.{}.", 1)
    if pattern not in NAMES:
        raise LimbeckError(
            f"{file.path}: tensor {name} has no place in {file.architecture}; it is another architecture"
        )
    return f"{NAMES[pattern].format(layer)}.{kind}"


def _dequantize(file: _File, name: str) -> Tensor:
    tensor = file.tensors[name]
    try:  # the file is the user's, and only the library knows which quantisations it can undo
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise LimbeckError(
            f"{file.path}: quantisation {kind} cannot be undone; take Q8_0 or F16 instead"
        ) from None
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _half_split(tensor: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of query and key rows: it rotates neighbours, HuggingFace rotates halves."""
    rows = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape).contiguous()


def _tokenizer(file: _File) -> tokenizers.Tokenizer:
    if file.need("tokenizer.ggml.model") != "gpt2":
        raise LimbeckError(
            f"{file.path}: a {file.get('tokenizer.ggml.model')} tokenizer is not supported, only gpt2; "
            "take the model's HuggingFace directory"
        )
    splitting = _splitting(file)
    tokens, merges = file.need("tokenizer.ggml.tokens"), file.need("tokenizer.ggml.merges")
    types = file.get("tokenizer.ggml.token_type", [gguf.TokenType.NORMAL] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=splitting.whole_words))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_cuts(splitting))
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(t, normalized=False, special=False) for t, k in zip(tokens, types) if k == USER_DEFINED
    ]
    special = [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types) if k == CONTROL]
    tokenizer.add_tokens(added)
    tokenizer.add_special_tokens(special)
    if file.get("tokenizer.ggml.add_bos_token", splitting.begins):
        tokenizer.post_processor = _begin_with(file, tokens)
    return tokenizer


def _splitting(file: _File) -> Splitting:
    name = file.get("tokenizer.ggml.pre", "default")
    if name not in SPLITTINGS:
        known = ", ".join(SPLITTINGS)
        raise LimbeckError(f"{file.path}: tokenizer rule {name} is not supported; supported are {known}")
    return SPLITTINGS[name]


def _cuts(splitting: Splitting) -> list[Any]:
    if not splitting.digits:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
        return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    # the words of tiktoken's cl100k; Llama 3 and Qwen2 differ in how many digits make a piece
    number = r"\p{N}" if splitting.digits == 1 else rf"\p{{N}}{{1,{splitting.digits}}}"
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(f"{words}|{number}|{rest}"), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _begin_with(file: _File, tokens: list[str]) -> processors.TemplateProcessing:
    start = file.need("tokenizer.ggml.bos_token_id")
    return processors.TemplateProcessing(
        single=f"{tokens[start]} $A",
        pair=f"{tokens[start]} $A {tokens[start]} $B",
        special_tokens=[(tokens[start], start)],
    )


def _tokenizer_settings(file: _File) -> dict[str, Any]:
    tokens, end = file.need("tokenizer.ggml.tokens"), file.need("tokenizer.ggml.eos_token_id")

    def token(key: str, default: int | None) -> str | None:
        found = file.get(f"tokenizer.ggml.{key}_token_id", default)
        return None if found is None else tokens[found]

    template = file.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos", None),
        "eos_token": tokens[end],
        "pad_token": token("padding", end),
        "model_max_length": _size(file, "context_length"),
        "clean_up_tokenization_spaces": False,
        **({"chat_template": template} if template else {}),
    }
