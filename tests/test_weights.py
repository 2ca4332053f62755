"""HuggingFace directories written and read back, and the words with which damaged ones are refused."""

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
    """A small random model."""
    config = ModelConfig(family, **TINY, intermediate_size=48, **switches)
    return Decoder(config).initialize(seed=1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of a small random model."""
    weights.save(tiny(), tmp_path)
    return tmp_path


def change(path: Path, **keys) -> None:
    """Set keys of a file of JSON."""
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, **keys}))


def retensor(directory: Path, edit) -> None:
    """Edit the tensors of a weight file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def word_level(size: int) -> Backend:
    """A tokenizer of the words w0, w1, ..."""
    words = {f"w{i}": i for i in range(size)}
    return Backend(WordLevel(words, unk_token="w0"))


def write_tokenizer(directory: Path, size: int) -> None:
    """Write a tokenizer of so many words."""
    word_level(size).save(str(directory / "tokenizer.json"))


def refusal(directory: Path) -> str:
    """The one sentence with which a directory is refused."""
    with pytest.raises(LimbeckError) as caught:
        weights.load(directory)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_keeps_every_bit(tmp_path, dtype, tied):
    """In every precision, with a tied head and without."""
    decoder = tiny(tied=tied).to(dtype)
    weights.save(decoder, tmp_path)
    again = weights.load(tmp_path, dtype)
    assert weights.digest(again) == weights.digest(decoder)
    assert again.config == decoder.config
    assert (again.head.weight is again.embed.weight) == tied


def test_the_same_weights_give_the_same_bytes(tmp_path):
    """All files of two directories are equal."""
    for name in ("one", "two"):
        weights.save(tiny(), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_large_models_are_sharded_and_read_back(tmp_path, monkeypatch):
    """Several files and their index; a missing one is named."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 10_000)
    decoder = tiny(tied=False)
    weights.save(decoder, tmp_path)
    shards = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert weights.digest(weights.load(tmp_path)) == weights.digest(decoder)
    shards[0].unlink()
    assert f"{shards[0]} is missing" in refusal(tmp_path)


def test_a_checkpoint_carries_its_tokenizer(tmp_path):
    """Its files, and the ids of its tokens in both configurations."""
    tokenizer = Tokenizer(word_level(40), "{{ messages }}", end="w7", pad="w9")
    weights.save(tiny(), tmp_path, tokenizer)
    assert Tokenizer.from_directory(tmp_path).end_id == 7
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == 7
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 7, "pad_token_id": 9}


@pytest.mark.parametrize("family, switches", [("llama", {"tied": False}), ("qwen2", {"qkv_bias": True})])
def test_the_digest_changes_with_any_weight(family, switches):
    """One number of each weight is changed."""
    decoder = tiny(family, **switches)
    seen = {weights.digest(decoder)}
    for weight in decoder.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        seen.add(weights.digest(decoder))
    assert len(seen) == 1 + len(list(decoder.parameters()))


def test_rotary_frequencies_and_an_equal_tied_head_are_no_harm(directory):
    """Tensors that old checkpoints carry; a different head is an error."""
    before = weights.digest(weights.load(directory))

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    retensor(directory, add)
    assert weights.digest(weights.load(directory)) == before
    retensor(directory, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "tie_word_embeddings" in refusal(directory)


def test_a_directory_without_configuration_is_refused(directory):
    """No config.json."""
    (directory / "config.json").unlink()
    assert "config.json is missing" in refusal(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_configuration_is_refused(directory, text):
    """No JSON, no object, no architecture."""
    (directory / "config.json").write_text(text)
    assert "config.json" in refusal(directory)


@pytest.mark.parametrize("size", [None, "32", 0, -1])
def test_a_size_that_is_none_is_refused(directory, size):
    """The error names key and value."""
    change(directory / "config.json", hidden_size=size)
    assert f"hidden_size = {size!r}" in refusal(directory)


def test_a_directory_without_weights_is_refused(directory):
    """No weight file."""
    (directory / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(directory)


def test_an_unsupported_architecture_is_refused_with_the_list_of_supported_ones(directory):
    """The error names the file, too."""
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
    """Cut off at several sizes."""
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(directory)
    for part in (str(path), "truncated", "copy it again"):
        assert part in message


def test_a_damaged_index_is_refused(directory):
    """An index that is no JSON."""
    (directory / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json" in refusal(directory)


def test_tensors_that_are_missing_or_have_no_place_are_refused(directory):
    """The error names the tensor."""
    name = "model.layers.1.mlp.up_proj.weight"
    retensor(directory, lambda tensors: tensors.pop(name))
    assert name in refusal(directory)
    extra = "model.layers.9.mlp.up_proj.weight"
    retensor(directory, lambda tensors: tensors.update({extra: torch.ones(2)}))
    assert extra in refusal(directory)


def test_weights_of_another_size_are_refused(directory):
    """The error names both sizes."""
    change(directory / "config.json", intermediate_size=64)
    message = refusal(directory)
    for part in ("mlp", "48", "64", "different models"):
        assert part in message


@pytest.mark.parametrize("size, fits", [(40, True), (30, True), (41, False), (0, False)])
def test_a_tokenizer_of_another_model_is_refused(directory, monkeypatch, size, fits):
    """More tokens than rows, or far fewer."""
    monkeypatch.setattr(weights, "SPARE_ROWS", 16)
    write_tokenizer(directory, size)
    if fits:
        weights.load(directory)
    else:
        message = refusal(directory)
        assert "tokenizer.json" in message
        assert "vocab_size = 40" in message


def test_a_damaged_tokenizer_is_refused(directory):
    """A tokenizer.json that is no JSON."""
    (directory / "tokenizer.json").write_text("{")
    assert "tokenizer.json: not a tokenizer" in refusal(directory)
