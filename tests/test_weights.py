"""Reading and writing HuggingFace directories: what comes back, and what is refused in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.text.tokenizer import Tokenizer
from limbeck.types import LimbeckError

TINY = {"vocab_size": 40, "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}


def tiny(family: str = "llama", **switches) -> Decoder:
    return Decoder(ModelConfig(family, **TINY, intermediate_size=48, **switches)).initialize(seed=1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    weights.save(tiny(), tmp_path)
    return tmp_path


def change(path: Path, **keys) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def retensor(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def write_tokenizer(directory: Path, size: int) -> None:
    Backend(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")).save(
        str(directory / "tokenizer.json")
    )


def refusal(directory: Path) -> str:
    with pytest.raises(LimbeckError) as caught:
        weights.load(directory)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_keeps_every_bit(tmp_path, dtype, tied):
    decoder = tiny(tied=tied).to(dtype)
    weights.save(decoder, tmp_path)
    again = weights.load(tmp_path, dtype)
    assert weights.digest(again) == weights.digest(decoder)
    assert again.config == decoder.config
    assert (again.head.weight is again.embed.weight) == tied


def test_the_same_weights_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        weights.save(tiny(), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_large_models_are_sharded_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 10_000)
    decoder = tiny(tied=False)
    weights.save(decoder, tmp_path)
    shards = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "model.safetensors").exists()
    assert weights.digest(weights.load(tmp_path)) == weights.digest(decoder)
    shards[0].unlink()
    assert f"{shards[0]} is missing" in refusal(tmp_path)


def test_a_checkpoint_carries_its_tokenizer(tmp_path):
    backend = Backend(WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    weights.save(tiny(), tmp_path, Tokenizer(backend, "{{ messages }}", end="w7", pad="w9"))
    assert Tokenizer.from_directory(tmp_path).end_id == 7
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "eos_token_id": 7,
        "pad_token_id": 9,
    }


@pytest.mark.parametrize("family, switches", [("llama", {"tied": False}), ("qwen2", {"qkv_bias": True})])
def test_the_digest_changes_with_any_weight(family, switches):
    decoder = tiny(family, **switches)
    seen = {weights.digest(decoder)}
    for weight in decoder.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        seen.add(weights.digest(decoder))
    assert len(seen) == 1 + len(list(decoder.parameters()))


def test_rotary_frequencies_and_an_equal_tied_head_are_no_harm(directory):
    before = weights.digest(weights.load(directory))

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    retensor(directory, add)
    assert weights.digest(weights.load(directory)) == before
    retensor(directory, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "tie_word_embeddings" in refusal(directory)


def test_a_directory_without_configuration_is_refused(directory):
    (directory / "config.json").unlink()
    assert "config.json is missing" in refusal(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_configuration_is_refused(directory, text):
    (directory / "config.json").write_text(text)
    assert "config.json" in refusal(directory)


@pytest.mark.parametrize("size", [None, "32", 0, -1])
def test_a_size_that_is_none_is_refused(directory, size):
    change(directory / "config.json", hidden_size=size)
    assert f"hidden_size = {size!r}" in refusal(directory)


def test_a_directory_without_weights_is_refused(directory):
    (directory / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(directory)


def test_an_unsupported_architecture_is_refused_with_the_list_of_supported_ones(directory):
    change(directory / "config.json", architectures=["MambaForCausalLM"])
    message = refusal(directory)
    for name in (
        "MambaForCausalLM",
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "config.json",
    ):
        assert name in message


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_weights_are_refused(directory, size):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(directory)
    assert str(path) in message and "truncated" in message and "copy it again" in message


def test_a_damaged_index_is_refused(directory):
    (directory / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json" in refusal(directory)


def test_tensors_that_are_missing_or_have_no_place_are_refused(directory):
    retensor(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in refusal(directory)
    retensor(directory, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}))
    assert "model.layers.9.mlp.up_proj.weight" in refusal(directory)


def test_weights_of_another_size_are_refused(directory):
    change(directory / "config.json", intermediate_size=64)
    message = refusal(directory)
    assert "mlp" in message and "48" in message and "64" in message and "different models" in message


@pytest.mark.parametrize("size, fits", [(40, True), (30, True), (41, False), (0, False)])
def test_a_tokenizer_of_another_model_is_refused(directory, monkeypatch, size, fits):
    monkeypatch.setattr(weights, "SPARE_ROWS", 16)
    write_tokenizer(directory, size)
    if fits:
        weights.load(directory)
    else:
        message = refusal(directory)
        assert "tokenizer.json" in message and "vocab_size = 40" in message


def test_a_damaged_tokenizer_is_refused(directory):
    (directory / "tokenizer.json").write_text("{")
    assert "tokenizer.json: not a tokenizer" in refusal(directory)
