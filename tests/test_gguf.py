"""GGUF files: tiny ones written here, and the real SmolLM2-135M-Instruct where it can be had."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf as ggml
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from limbeck.model import gguf, weights
from limbeck.model.cache import Packed
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.pull import pull
from limbeck.tokenizer import Tokenizer
from limbeck.types import LimbeckError

ARCHITECTURES = {
    "llama": ggml.MODEL_ARCH.LLAMA,
    "qwen2": ggml.MODEL_ARCH.QWEN2,
    "qwen3": ggml.MODEL_ARCH.QWEN3,
}
SWITCHES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
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
    gguf.convert(write_gguf(decoder, tmp_path / "m.gguf"), tmp_path / "hf")
    again = weights.load(tmp_path / "hf")
    assert again.config == decoder.config
    assert weights.digest(again) == weights.digest(decoder)


@pytest.mark.parametrize("kind, close", [("f16", 2e-2), ("q8_0", 0.3)])
def test_a_quantised_model_comes_back_as_near_as_its_bits_allow(tmp_path, kind, close):
    decoder = tiny()
    gguf.convert(write_gguf(decoder, tmp_path / "m.gguf", kind), tmp_path / "hf")
    found, expected = logits(weights.load(tmp_path / "hf")), logits(decoder)
    assert 0 < (found - expected).abs().max() < close


def test_transformers_reads_weights_and_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    decoder, directory = tiny(), tmp_path / "hf"
    gguf.convert(write_gguf(decoder, tmp_path / "m.gguf"), directory)
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
    gguf.convert(write_gguf(tiny(), tmp_path / "m.gguf", pre=pre), tmp_path / "hf")
    backend = Tokenizer.from_directory(tmp_path / "hf").backend
    assert backend.encode("1234", add_special_tokens=False).tokens == pieces
    assert backend.encode(" t1").tokens[-2:] == ["Ġt", "1"]
    assert (backend.encode("t").ids[0] == 0) == (pre == "llama-bpe")


def refusal(path: Path) -> str:
    with pytest.raises(LimbeckError) as caught:
        gguf.convert(path, path.parent / "hf")
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
    factors = gguf._llama3_factors(5e5, 64, scaling)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        rope_theta=5e5, rope_scaling=scaling, head_dim=64, num_attention_heads=4
    )
    plain = 5e5 ** -(np.arange(32) / 32)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(plain / factors, rotary.inv_freq.numpy(), rtol=1e-5)


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
