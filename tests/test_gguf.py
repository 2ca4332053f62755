"""GGUF files in and out: tiny ones of every family, and the real SmolLM2-135M-Instruct where it can be had.

Reading is tested on files written here with the gguf package's own table of names, writing on what reading
makes of it. What llama.cpp computes with the files is test_llamacpp.py's affair.
"""

from __future__ import annotations

import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

import checkpoints
import gguf as ggml
import numpy as np
import pytest
import tokenizers
import torch
from checkpoints import CHECKPOINTS, GPT2, isolated
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, pre_tokenizers

from limbeck import cli
from limbeck.model import gguf, weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.kv_cache import Packed
from limbeck.model.pull import pull
from limbeck.text.tokenizer import Tokenizer
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow

ARCHITECTURES = {
    "llama": ggml.MODEL_ARCH.LLAMA,
    "qwen2": ggml.MODEL_ARCH.QWEN2,
    "qwen3": ggml.MODEL_ARCH.QWEN3,
}
SWITCHES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": "before"}}
KINDS = {
    "f32": ggml.GGMLQuantizationType.F32,
    "f16": ggml.GGMLQuantizationType.F16,
    "q8_0": ggml.GGMLQuantizationType.Q8_0,
}
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|im_start|>", "<|im_end|>"]
MERGED = ["12", "123", "Ġt"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tiny(family: str = "llama", **switches) -> Decoder:
    config = ModelConfig(
        family,
        vocab_size=len(SPECIAL + LETTERS + MERGED),
        hidden_size=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        norm_eps=1e-5,
        max_positions=512,
        **{**SWITCHES[family], **switches},
    )
    decoder, random = Decoder(config).initialize(seed=3), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.add_(torch.randn(weight.shape, generator=random) * 0.1)
    return decoder


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to Llama's queries and keys: halves of a head become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(decoder: Decoder, path: Path, kind: str = "f32", pre: str = "smollm", name: str = "") -> Path:
    """A GGUF file as llama.cpp's converter would write it, tensor names by the gguf package's own table."""
    config = decoder.config
    writer = ggml.GGUFWriter(path, name or config.family)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(SPECIAL + LETTERS + MERGED)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(LETTERS + MERGED))
    writer.add_token_merges(["1 2", "12 3", "Ġ t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    _add_tensors(writer, decoder, path.parent, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensors(writer: ggml.GGUFWriter, decoder: Decoder, folder: Path, kind: str) -> None:
    config = decoder.config
    weights.save(decoder, folder / "original")
    names = ggml.get_tensor_name_map(ARCHITECTURES[config.family], config.layers)
    for theirs, tensor in load_file(folder / "original" / "model.safetensors").items():
        values = tensor.numpy()
        if config.family == "llama" and ".q_proj" in theirs:
            values = interleave(values, config.heads)
        if config.family == "llama" and ".k_proj" in theirs:
            values = interleave(values, config.kv_heads)
        quantised = KINDS[kind] if values.ndim > 1 else KINDS["f32"]
        packed = ggml.quants.quantize(np.ascontiguousarray(values), quantised)
        writer.add_tensor(names.get_name(theirs, (".weight", ".bias")) or theirs, packed, raw_dtype=quantised)


def logits(decoder: Decoder) -> torch.Tensor:
    row = torch.arange(40) * 5 % decoder.config.vocab_size
    with torch.no_grad():
        return decoder.head(decoder(row, Packed([len(row)])))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_an_unquantised_model_comes_back_to_the_bit(tmp_path, family, tied):
    decoder = tiny(family, tied=tied)
    gguf.read(write_gguf(decoder, tmp_path / "m.gguf"), tmp_path / "hf")
    again = weights.load(tmp_path / "hf")
    assert again.config == decoder.config
    assert weights.digest(again) == weights.digest(decoder)


@pytest.mark.parametrize("kind, close", [("f16", 2e-2), ("q8_0", 0.3)])
def test_a_quantised_model_comes_back_as_near_as_its_bits_allow(tmp_path, kind, close):
    decoder = tiny()
    gguf.read(write_gguf(decoder, tmp_path / "m.gguf", kind), tmp_path / "hf")
    found, expected = logits(weights.load(tmp_path / "hf")), logits(decoder)
    assert 0 < (found - expected).abs().max() < close


def test_transformers_reads_weights_and_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    decoder, directory = tiny(), tmp_path / "hf"
    gguf.read(write_gguf(decoder, tmp_path / "m.gguf"), directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    row = torch.arange(40) * 5 % decoder.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(theirs(row.unsqueeze(0)).logits[0], logits(decoder), atol=1e-4, rtol=0)
    tokenizer, ours = (
        transformers.AutoTokenizer.from_pretrained(directory),
        Tokenizer.from_directory(directory),
    )
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        SPECIAL[1],
        SPECIAL[1],
        SPECIAL[0],
    )
    chat = [{"role": "user", "content": "what is 123 t? 中"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == ours.render(chat)
    assert tokenizer(ours.render(chat), add_special_tokens=False)["input_ids"] == list(ours.prompt(chat))
    assert ours.decode(ours.prompt(chat)) == "<|im_start|>what is 123 t? 中"


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
        ("gpt-2", ["123", "4"]),
    ],
)
def test_digits_are_split_as_the_file_says(tmp_path, pre, pieces):
    gguf.read(write_gguf(tiny(), tmp_path / "m.gguf", pre=pre), tmp_path / "hf")
    backend = Tokenizer.from_directory(tmp_path / "hf").backend
    assert backend.encode("1234", add_special_tokens=False).tokens == pieces
    assert backend.encode(" t1").tokens[-2:] == ["Ġt", "1"]
    assert (backend.encode("t").ids[0] == 0) == (pre == "llama-bpe")


def refusal(path: Path) -> str:
    with pytest.raises(LimbeckError) as caught:
        gguf.read(path, path.parent / "hf")
    assert not (path.parent / "hf").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.05, 0.2, 0.6, 0.999])
def test_truncated_files_are_refused(tmp_path, keep):
    path = write_gguf(tiny(), tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    message = refusal(path)
    assert str(path) in message and "truncated" in message and "download it again" in message


def test_other_files_are_refused(tmp_path):
    assert "is missing" in refusal(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no weights here, only words " * 20)
    assert "not a GGUF file" in refusal(tmp_path / "text.gguf")


def test_unsupported_architectures_and_rules_are_refused_with_what_is_supported(tmp_path):
    message = refusal(write_gguf(tiny(), tmp_path / "m.gguf", name="mamba"))
    assert "mamba" in message and "llama, qwen2, qwen3" in message
    message = refusal(write_gguf(tiny(), tmp_path / "m.gguf", pre="tekken"))
    assert "tekken" in message and "smollm" in message


def test_llama3_rope_factors_become_a_configuration():
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = gguf.rope.factors(5e5, 64, scaling)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        rope_theta=5e5, rope_scaling=scaling, head_dim=64, num_attention_heads=4
    )
    plain = 5e5 ** -(np.arange(32) / 32)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(plain / factors, rotary.inv_freq.numpy(), rtol=1e-5)


# ---------------------------------------------------------------- writing

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    (
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
)
CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")
DIGITS = pre_tokenizers.Digits(individual_digits=True)

# How the tokenizers of these models cut text, in the words of their tokenizer.json.
RULES = {
    "gpt-2": {"steps": [GPT2]},
    "smollm": {"steps": [DIGITS, GPT2]},
    "llama-bpe": {"steps": isolated(CL100K.replace("DIGITS", "{1,3}")), "whole_words": True},
    "qwen2": {"steps": isolated(CL100K.replace("DIGITS", "")), "nfc": True},
    "deepseek-v3": {"steps": isolated(*DEEPSEEK3)},
    "deepseek-coder": {"steps": [*isolated(*CODER)[:-1], DIGITS, isolated()[-1]]},
}
TEXT = (
    "In 1984, the naïve 中文 を 🙂\n\tx = 3.14  # it's DON'T they're\r\n\n   "
    "the<think>12312</think><|im_end|>"
)


def checkpoint(folder: Path, name: str = "llama", rows: int = 280, **changes) -> Path:
    """A directory as transformers saves it, with a tokenizer of fewer tokens than the embedding has rows."""
    pytest.importorskip("transformers")
    checkpoints.save(name, folder / "hf", rows, **changes)
    checkpoints.save_tokenizer(folder / "hf")
    return folder / "hf"


def there_and_back(directory: Path, kind: str = "f32") -> Path:
    gguf.write(directory, directory.parent / "m.gguf", kind)
    gguf.read(directory.parent / "m.gguf", directory.parent / "back")
    return directory.parent / "back"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_comes_back_to_the_bit(tmp_path, name):
    """Every tensor by itself; and, so that config.json is complete, what transformers computes with them."""
    transformers = pytest.importorskip("transformers")
    model = checkpoints.save(name, tmp_path / "hf", 280)
    checkpoints.save_tokenizer(tmp_path / "hf")
    back = there_and_back(tmp_path / "hf")
    before, after = tensors(tmp_path / "hf"), tensors(back)
    assert before.keys() == after.keys()
    exact = name != "gemma3"  # whose norms GGUF stores one higher, which rounds them
    for key, tensor in before.items():
        tolerance = 0 if exact or not key.endswith("norm.weight") else 1.2e-7
        torch.testing.assert_close(after[key], tensor, atol=tolerance, rtol=0)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        back, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    row = torch.arange(300).unsqueeze(0) * 7 % 280
    with torch.no_grad():
        found, expected = again(row).logits, model(row).logits
    torch.testing.assert_close(found, expected, atol=0 if exact else 1e-4, rtol=0)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_names_are_those_of_the_gguf_package(tmp_path, name):
    gguf.write(checkpoint(tmp_path, name), tmp_path / "m.gguf", "f16")
    reader = ggml.GGUFReader(tmp_path / "m.gguf")
    architecture = reader.fields["general.architecture"].contents()
    (model,) = (kind for kind, known in ggml.MODEL_ARCH_NAMES.items() if known == architecture)
    patterns = {ggml.TENSOR_NAMES[tensor] for tensor in ggml.MODEL_TENSORS[model]}
    for tensor in reader.tensors:
        stem = tensor.name.rsplit(".", 1)[0]
        layer = stem.split(".")[1] if stem.startswith("blk.") else ""
        assert stem.replace(f"blk.{layer}.", "blk.{bid}.") in patterns


def test_small_and_odd_tensors_keep_their_precision(tmp_path):
    """Vectors and routers in fp32; rows that blocks of 32 do not fill in f16."""
    gguf.write(checkpoint(tmp_path, "deepseek-v3", intermediate_size=88), tmp_path / "m.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in ggml.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32" and kinds["blk.0.ffn_down.weight"] == "F16"
    assert (
        kinds["token_embd.weight"]
        == kinds["blk.1.ffn_up_exps.weight"]
        == kinds["blk.0.attn_k_b.weight"]
        == "Q8_0"
    )


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "deepseek-v3"])
@pytest.mark.parametrize("kind, close", [("f16", 2**-11), ("q8_0", 1 / 127)])
def test_what_is_rounded_stays_as_near_as_its_bits_allow(tmp_path, name, kind, close):
    before = tensors(checkpoint(tmp_path, name))
    after = tensors(there_and_back(tmp_path / "hf", kind))
    for key, tensor in before.items():
        error = (after[key] - tensor).abs().max() / tensor.abs().max()
        assert error < close and (tensor.dim() > 1 or error == 0)


def test_shards_and_half_precision_are_read(tmp_path):
    model = checkpoints.save("llama", tmp_path / "hf", 280)
    expected = tensors(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    checkpoints.save_tokenizer(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    found = tensors(there_and_back(tmp_path / "hf"))
    assert all(torch.equal(found[name], expected[name].bfloat16().float()) for name in expected)


def test_a_window_becomes_the_context(tmp_path):
    """Inside it a model with sliding attention is one without, and that is what llama.cpp runs."""
    back = there_and_back(checkpoint(tmp_path, "mistral", sliding_window=64))
    assert json.loads((back / "config.json").read_text())["max_position_embeddings"] == 64


def test_layers_that_predict_further_tokens_stay_out(tmp_path):
    directory = checkpoint(tmp_path, "deepseek-v3")
    held = load_file(directory / "model.safetensors")
    save_file({**held, "model.layers.3.eh_proj.weight": torch.ones(2, 2)}, directory / "model.safetensors")
    assert tensors(there_and_back(directory)).keys() == held.keys()


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", RULES)
def test_a_tokenizer_comes_back_with_its_rule(tmp_path, name):
    directory, made = checkpoint(tmp_path), checkpoints.tokenizer(**RULES[name])
    checkpoints.save_tokenizer(directory, made)
    back = Tokenizer.from_directory(there_and_back(directory))
    fields = ggml.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 280
    assert back.backend.encode(TEXT).ids == made.encode(TEXT).ids
    assert (back.bos, back.end, back.pad, back.size) == (
        *checkpoints.SPECIAL[1:],
        checkpoints.SPECIAL[0],
        266,
    )
    assert back.template == checkpoints.TEMPLATE


SENTENCEPIECE = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *(f"<0x{i:02X}>" for i in range(256))]
PIECES = ["▁t", "he", "▁the", "12", "▁▁", *"▁the123<>"]  # in the order of their scores


def gemma_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer as Gemma's: merges over whole texts, bytes for characters without a token."""
    ids = {token: i for i, token in enumerate([*SENTENCEPIECE, *PIECES])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("1", "2"), ("▁", "▁")]
    model = tokenizers.models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SENTENCEPIECE[:4]])
    made.add_tokens([AddedToken("\n", normalized=False)])
    return made


def naive_sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """Merge the neighbours with the highest score until none is left; unknown characters become bytes."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(scores.get(a + b, -math.inf), -i) for i, (a, b) in enumerate(pairwise(symbols))]
        best, place = max(pairs, default=(-math.inf, 0))
        if best == -math.inf:
            break
        symbols[-place : 2 - place] = ["".join(symbols[-place : 2 - place])]
    known = [[s] if s in scores else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols]
    return [piece for pieces in known for piece in pieces]


def test_sentencepiece_comes_back_and_merges_by_score(tmp_path):
    pytest.importorskip("transformers")
    made = gemma_tokenizer()
    checkpoints.save("gemma3", tmp_path / "hf", made.get_vocab_size())
    ends = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True}
    checkpoints.save_tokenizer(tmp_path / "hf", made, **ends)
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    back = Tokenizer.from_directory(there_and_back(tmp_path / "hf"))
    fields = ggml.GGUFReader(tmp_path / "m.gguf").fields
    stored = {key: fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type")}
    normal = ggml.TokenType.NORMAL
    scores = {t: s for t, s, kind in zip(*stored.values(), strict=True) if kind == normal}
    for text in ("the 123 12", " the  he", "naïve 中🙂", "1212312"):
        tokens = back.encode(text)
        assert [back.backend.id_to_token(token) for token in tokens] == naive_sentencepiece(text, scores)
        assert tokens == made.encode(text, add_special_tokens=False).ids
        assert back.decode(tokens) == text
    assert back.prompt("the").tolist() == [2, *back.encode("the")]


def test_the_long_rule_of_deepseek_llm_is_recognised(tmp_path):
    """Lines, words of cased letters, punctuation, blanks at the end, Han, digits."""
    rule = gguf.vocabulary.SPLITTINGS["deepseek-llm"]
    made = checkpoints.tokenizer(isolated(*rule.cuts))
    pieces = [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str("under 中12!?\n")]
    assert pieces == ["under", "Ġ", "ä¸Ń", "1", "2", "!?", "Ċ"]
    directory = checkpoint(tmp_path)
    checkpoints.save_tokenizer(directory, made)
    assert (
        Tokenizer.from_directory(there_and_back(directory)).backend.encode(TEXT).ids == made.encode(TEXT).ids
    )


@pytest.mark.parametrize("settings, begins", [({}, False), ({"add_bos_token": True}, True)])
def test_whether_a_text_begins_with_a_token_is_kept(tmp_path, settings, begins):
    directory = checkpoint(tmp_path)
    checkpoints.save_tokenizer(directory, **settings)
    backend = Tokenizer.from_directory(there_and_back(directory)).backend
    assert backend.encode("t").ids[:1] == ([1] if begins else [backend.token_to_id("t")])


def wordlevel() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: i for i, token in enumerate(checkpoints.SPECIAL)})
    )


def swallowing() -> tokenizers.Tokenizer:
    made = checkpoints.tokenizer()
    made.add_tokens([AddedToken("<greedy>", lstrip=True)])
    return made


@pytest.mark.parametrize(
    "made, settings, says",
    [
        (wordlevel, {}, "WordLevel has no place"),
        (lambda: checkpoints.tokenizer(isolated(r"\p{L}+")), {}, "none of the rules"),
        (lambda: checkpoints.tokenizer([pre_tokenizers.Whitespace()]), {}, "none of the rules"),
        (lambda: checkpoints.tokenizer(nfc=True), {}, "none of the rules"),
        (swallowing, {}, "'<greedy>' swallows its neighbours"),
        (checkpoints.tokenizer, {"eos_token": None}, "eos_token is missing"),
        (checkpoints.tokenizer, {"bos_token": "<s>"}, "has no token '<s>'"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_hold_are_refused(tmp_path, made, settings, says):
    directory = checkpoint(tmp_path)
    checkpoints.save_tokenizer(directory, made(), **settings)
    assert says in unwritten(directory)


# ---------------------------------------------------------------- refusals in writing


def unwritten(directory: Path, kind: str = "f16") -> str:
    """The one sentence with which a directory is refused; nothing is left where the file would have been."""
    out = directory.parent / "out"
    out.mkdir(exist_ok=True)
    with pytest.raises(LimbeckError) as caught:
        gguf.write(directory, out / "m.gguf", kind)
    assert not list(out.iterdir()) and "\n" not in str(caught.value)
    return str(caught.value)


MSCALE = {**checkpoints.YARN, "mscale": 1.0, "mscale_all_dim": 0.5}


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("llama", {"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM has no GGUF here"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"num_hidden_layers": "three"}, "num_hidden_layers = 'three'"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0"),
        ("llama", {"num_key_value_heads": "2"}, "num_key_value_heads = '2'"),
        ("llama", {"vocab_size": 300}, "the embedding has 280 rows"),
        ("deepseek-v3", {"n_group": "four"}, "n_group = 'four'"),
        ("llama", {"num_hidden_layers": 4}, "9 tensors are missing"),
        ("llama", {"num_attention_heads": 7}, "config.json's sizes do not divide"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "rope_scaling of type dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "is incomplete"),
        ("qwen3", {"rope_parameters": checkpoints.LLAMA3}, "llama3 is for Llama only"),
        ("qwen3", {"rope_parameters": MSCALE}, "rope_scaling.mscale has no place"),
        ("qwen3moe", {"norm_topk_prob": None}, "norm_topk_prob = False is not what llama.cpp computes"),
        ("qwen3moe", {"mlp_only_layers": [0]}, "mlp_only_layers = [0]"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "two best"),
        ("deepseek-v3", {"rope_parameters": MSCALE}, "llama.cpp needs both, and equal"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave = False"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank = None"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(tmp_path, name, changes, says):
    directory = checkpoint(tmp_path, name)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = unwritten(directory)
    assert says in message and str(directory) in message


def test_damaged_directories_are_refused(tmp_path):
    directory = checkpoint(tmp_path)
    assert "types are f32, f16, q8_0" in unwritten(directory, "q4_0")
    file = directory / "model.safetensors"
    held = load_file(file)
    save_file({**held, "model.layers.0.strange.weight": torch.ones(1)}, file)
    assert "model.layers.0.strange.weight has no place in llama" in unwritten(directory)
    save_file({**held, "model.norm.weight": held["model.norm.weight"].to(torch.float8_e4m3fn)}, file)
    assert "model.norm.weight is F8_E4M3" in unwritten(directory)
    save_file({**held, "lm_head.weight": held["lm_head.weight"] * 1e6}, file)
    assert "output.weight holds numbers that f16 cannot" in unwritten(directory)
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated or damaged" in unwritten(directory)
    file.unlink()
    assert "model.safetensors is missing" in unwritten(directory)
    (directory / "tokenizer.json").write_text("{")
    (directory / "config.json").write_text("[]")
    assert "no model's configuration" in unwritten(directory)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    directory, out = checkpoint(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "m.gguf").write_text("the old one")
    written = []

    def full(self, tensor):
        written.append(tensor)
        if len(written) == 5:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ggml.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left"):
        gguf.write(directory, out / "m.gguf")
    assert [path.read_text() for path in out.iterdir()] == ["the old one"]


# ---------------------------------------------------------------- refusals in reading


def spoiled(
    folder: Path, key: str, value, kind: ggml.GGUFValueType, part: ggml.GGUFValueType | None = None
) -> Path:
    """A sound file in which one key holds something else."""
    path = write_gguf(tiny(), folder / "m.gguf")
    reader = ggml.GGUFReader(path)
    writer = ggml.GGUFWriter(folder / "spoiled.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (key, "general.architecture"):
            part_of = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], part_of)
    if value is not None:
        writer.add_key_value(key, value, kind, part)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "spoiled.gguf"


T = ggml.GGUFValueType


@pytest.mark.parametrize(
    "key, value, kind, part, says",
    [
        ("llama.block_count", None, None, None, "llama.block_count is missing"),
        ("llama.block_count", "two", T.STRING, None, "llama.block_count is damaged, one number"),
        ("llama.block_count", 0, T.UINT32, None, "llama.block_count = 0 is no size"),
        ("llama.block_count", 3, T.UINT32, None, "blk.2.attn_norm.weight is missing"),
        ("llama.block_count", 1, T.UINT32, None, "blk.1.attn_k.weight has no place"),
        ("llama.feed_forward_length", [96, 96], T.ARRAY, T.UINT32, "llama.feed_forward_length is damaged"),
        ("llama.attention.head_count", 5, T.UINT32, None, "which the sizes in the file do not divide"),
        (
            "llama.attention.layer_norm_rms_epsilon",
            "tiny",
            T.STRING,
            None,
            "layer_norm_rms_epsilon is damaged",
        ),
        ("llama.expert_count", 8, T.UINT32, None, "experts are not supported in llama"),
        ("llama.rope.scaling.type", "longrope", T.STRING, None, "rope scaling of type longrope"),
        ("tokenizer.ggml.eos_token_id", 9999, T.UINT32, None, "eos_token_id = 9999 is no token"),
        ("tokenizer.ggml.tokens", [1, 2], T.ARRAY, T.UINT32, "token_type and merges are damaged"),
        ("tokenizer.ggml.merges", ["x y z q"], T.ARRAY, T.STRING, "merges do not fit"),
        ("tokenizer.ggml.model", "bert", T.STRING, None, "a bert tokenizer is not supported"),
        ("tokenizer.ggml.model", "llama", T.STRING, None, "add_space_prefix is true"),
    ],
)
def test_damaged_keys_are_refused(tmp_path, key, value, kind, part, says):
    message = refusal(spoiled(tmp_path, key, value, kind, part))
    assert says in message and "spoiled.gguf" in message


@pytest.mark.parametrize(
    "kind, says", [(999, "unknown quantisation 999"), (26, "quantisation I32, which cannot be undone")]
)
def test_unknown_quantisations_are_refused_with_the_tensor(tmp_path, kind, says):
    path = write_gguf(tiny(), tmp_path / "m.gguf")
    reader = ggml.GGUFReader(path)
    (field,) = (t.field for t in reader.tensors if t.name == "output_norm.weight")
    place = field.offset + sum(int(part.nbytes) for part in field.parts[:4])
    raw = bytearray(path.read_bytes())
    raw[place : place + 4] = kind.to_bytes(4, "little")
    path.write_bytes(raw)
    message = refusal(path)
    assert says in message and "output_norm.weight" in message and str(path) in message


# ---------------------------------------------------------------- the command


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["limbeck", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, *capsys.readouterr()


def test_the_command_writes_beside_us_or_where_it_is_told(tmp_path, monkeypatch, capsys):
    checkpoint(tmp_path / "models" / "small").rename(tmp_path / "models" / "named")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, capsys, "named") == (0, "named-f16.gguf\n", "")
    assert command(monkeypatch, capsys, "models/named", "--gguf", "q8_0", "--out", "x.gguf") == (
        0,
        "x.gguf\n",
        "",
    )
    sizes = [(tmp_path / name).stat().st_size for name in ("named-f16.gguf", "x.gguf")]
    assert sizes[0] > sizes[1] > 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere"], "nowhere: no model or artifact of that name"),
        (["."], ".: holds no model: neither config.json"),
        (["m.gguf"], "m.gguf is a GGUF file already"),
        ([".", "--gguf", "q4"], "there is no GGUF type 'q4'; types are f32, f16, q8_0"),
    ],
)
def test_the_command_explains_a_mistake_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, says):
    (tmp_path / "m.gguf").touch()
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert code == 2 and not out and says in err and err.count("\n") == 1


# ---------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """The real model: where LIMBECK_SMOLLM2 says, or `models/`, or pulled; skipped where no network is."""
    here = Path(os.environ.get("LIMBECK_SMOLLM2", "models/smollm2-135m"))
    if (here / "config.json").exists():
        return here
    try:
        return pull("smollm2-135m", tmp_path_factory.mktemp("models"))
    except LimbeckError as error:
        pytest.skip(str(error))


def test_smollm2_equals_transformers(smollm2):
    """Within 1e-4: in fp32 beside the rounding of logits as large as 40, in fp64 without."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ours = weights.load(smollm2)
    row = torch.from_numpy(Tokenizer.from_directory(smollm2).prompt("Why is the sky blue?"))
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 0.0)):
        with torch.no_grad():
            expected = theirs.to(dtype)(row.unsqueeze(0)).logits[0]
            found = ours.to(dtype)
            found = found.head(found(row, Packed([len(row)])))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=rtol)


def test_smollm2_answers(smollm2):
    decoder, tokenizer = weights.load(smollm2), Tokenizer.from_directory(smollm2)
    row = list(tokenizer.prompt("What is the capital of France?"))
    begin = len(row)
    while row[-1] != tokenizer.end_id and len(row) < begin + 12:
        with torch.no_grad():
            hidden = decoder(torch.tensor(row), Packed([len(row)]))
            row.append(int(decoder.head(hidden[-1]).argmax()))
    assert tokenizer.decode(row[begin:]) == "The capital of France is Paris."


def test_smollm2_splits_digits_and_keeps_every_character(smollm2):
    tokenizer = Tokenizer.from_directory(smollm2)
    text = "In 1984, naïve 中文 🙂\n\tx = 3.14  # it's"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1984")) == 4
    assert tokenizer.encode("<|im_start|>user") == [1, tokenizer.backend.token_to_id("user")]
    assert json.loads((smollm2 / "generation_config.json").read_text()) == {
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
