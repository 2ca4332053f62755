"""Families that transformers does not hold whole, built from its parts; and what checkpoints of mixtures may look like."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from limbeck.model import weights
from limbeck.model.config import Experts, Latent, ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.kv_cache import Packed
from limbeck.types import LimbeckError

transformers = pytest.importorskip("transformers")

V3 = ModelConfig(
    "deepseek_v3", 48, 32, 3, 4, 4, 4, 48, tied=False, latent=Latent(12, 8, 4, 8, 16),
    experts=Experts(8, 2, 12, 12, sigmoid=True, balanced=True, normalize=True, scale=2.5, groups=4, top_groups=2, dense=(0,)),
)  # fmt: skip


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(
                torch.randn_like(weight) * 0.15 + (weight.ndim == 1)
            )  # norms near one; parts come uninitialised
    return model.eval()


def logits(decoder: Decoder, row: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return decoder.head(decoder(row, Packed([len(row)])))


def tokens(count: int = 60) -> torch.Tensor:
    return torch.randint(1, 48, (count,), generator=torch.Generator().manual_seed(3))


def saved(config: ModelConfig, directory: Path, seed: int = 0) -> Decoder:
    model = Decoder(config).initialize(seed)
    weights.save(model, directory)
    return model


def change(path: Path, **keys) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def retensor(directory: Path, edit) -> None:
    held = load_file(directory / "model.safetensors")
    edit(held)
    save_file(held, directory / "model.safetensors")


def refusal(directory: Path) -> str:
    with pytest.raises(LimbeckError) as caught:
        weights.load(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- families built from parts


def test_deepseek_moe_is_llamas_attention_and_v2s_experts(tmp_path):
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    sizes = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, max_position_embeddings=256, pad_token_id=None)
    )
    mixture = transformers.DeepseekV2Config(
        **sizes,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        n_shared_experts=2,
        topk_method="greedy",
    )
    for layer in theirs.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(mixture)
    shaken(theirs)
    experts = Experts(6, 2, 12, 24, dense=(0,))
    config = ModelConfig("deepseek", 48, 32, 3, 4, 4, 8, 48, tied=False, experts=experts, max_positions=256)
    ours = saved(config, tmp_path)
    copy_from(theirs, ours)
    with torch.no_grad():
        torch.testing.assert_close(
            logits(ours, tokens()), theirs(tokens()[None]).logits[0], atol=1e-4, rtol=0
        )
    weights.save(ours, tmp_path)
    again = weights.load(tmp_path)
    assert again.config == config and torch.equal(logits(again, tokens()), logits(ours, tokens()))


def test_hunyuan_large_shares_keys_and_leaves_its_one_experts_weight_alone(tmp_path):
    """transformers' smaller Hunyuan, whose every second layer is handed the first's keys and values."""
    given = transformers.HunYuanMoEV1Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        moe_topk=1,
        max_position_embeddings=256,
        pad_token_id=None,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
    )
    theirs = shaken(transformers.HunYuanMoEV1ForCausalLM(given))
    for layer in theirs.model.layers:  # its gate would make one weight 1

        def gate(x, layer=layer):
            shares = layer.mlp.gate.wg(x.reshape(-1, 32)).softmax(-1)
            return None, *shares.topk(1)

        layer.mlp.gate.forward = gate
    for first, second in zip(theirs.model.layers[::2], theirs.model.layers[1::2], strict=True):
        for kind in ("k_proj", "v_proj"):
            made = {}
            getattr(first.self_attn, kind).register_forward_hook(
                lambda _, __, out, made=made: made.update(out=out)
            )
            getattr(second.self_attn, kind).forward = lambda x, made=made: made["out"]
    experts = Experts(4, 1, 24, 24)
    config = ModelConfig(
        "hunyuan",
        48,
        32,
        4,
        4,
        2,
        8,
        24,
        qk_norm="after",
        share_kv=2,
        experts=experts,
        norm_eps=1e-5,
        max_positions=256,
    )
    ours = saved(config, tmp_path)
    copy_from(theirs, ours)
    with torch.no_grad():
        torch.testing.assert_close(
            logits(ours, tokens()), theirs(tokens()[None]).logits[0], atol=1e-4, rtol=0
        )


def copy_from(theirs: torch.nn.Module, ours: Decoder) -> None:
    """By the names that a checkpoint has."""
    held, mine = theirs.state_dict(), dict(ours.named_parameters())
    for part in weights.parts(ours):
        stem, _, rest = part.theirs.partition(".experts.")
        if rest:
            number, kind, _ = rest.split(".")
            both = held[f"{stem}.experts.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"][
                int(number)
            ]
            source = both if kind == "down_proj" else both.chunk(2)[kind == "up_proj"]
        else:
            source = held[part.theirs]
        part.place(mine[part.ours].data).copy_(source)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("tied", [True, False])
def test_modules_that_look_ahead_travel_and_transformers_leaves_them(tmp_path, tied):
    model = saved(replace(V3, predicted=1, tied=tied), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert "model.layers.3.eh_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert weights.digest(weights.load(tmp_path)) == weights.digest(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            logits(model, tokens()), theirs(tokens()[None]).logits[0], atol=1e-4, rtol=0
        )
    theirs.save_pretrained(tmp_path / "again")
    change(
        tmp_path / "again" / "config.json", num_nextn_predict_layers=1
    )  # announced, as fine-tuned copies of V3 do
    assert weights.load(tmp_path / "again").config.predicted == 0


def test_a_repeated_embedding_of_a_module_that_looks_ahead_is_no_harm(tmp_path):
    model = saved(replace(V3, predicted=1), tmp_path)
    retensor(
        tmp_path,
        lambda held: held.update(
            {
                "model.layers.3.embed_tokens.weight": held["model.embed_tokens.weight"].clone(),
                "model.layers.3.shared_head.head.weight": held["lm_head.weight"].clone(),
            }
        ),
    )
    assert weights.digest(weights.load(tmp_path)) == weights.digest(model)


def test_fp8_weights_are_multiplied_by_their_blocks_scales(tmp_path):
    config = replace(V3, hidden_size=160, intermediate_size=300, vocab_size=48)
    saved(config, tmp_path)
    plain, name = {}, "model.layers.0.mlp.down_proj.weight"

    def quantize(held: dict) -> None:
        for kind in (name, "model.layers.1.mlp.experts.3.gate_proj.weight"):
            weight = held[kind]
            scale = torch.rand(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128)) + 0.5
            held[kind] = (weight * 100).to(torch.float8_e4m3fn)
            held[f"{kind}_scale_inv"] = scale
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[
                : weight.shape[0], : weight.shape[1]
            ]
            plain[kind] = held[kind].float() * wide

    retensor(tmp_path, quantize)
    model = weights.load(tmp_path)
    mine = dict(model.named_parameters())
    for part in weights.parts(model):
        if part.theirs in plain:
            assert torch.equal(part.place(mine[part.ours]), plain[part.theirs])
    retensor(tmp_path, lambda held: held.pop(f"{name}_scale_inv"))
    assert f"{name} is in FP8, but {name}_scale_inv is missing" in refusal(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    saved(V3, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    files = sorted(set(tree["weight_map"].values()))
    moved = next(name for name, file in tree["weight_map"].items() if file == files[0])
    tree["weight_map"][moved] = files[1]
    index.write_text(json.dumps(tree))
    assert f"{moved} is said to be in {files[1]}, which does not hold it" in refusal(tmp_path)


def test_an_index_cannot_point_out_of_its_directory(tmp_path):
    saved(V3, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "stray.safetensors")
    names = load_file(tmp_path / "stray.safetensors")
    tree = {"weight_map": dict.fromkeys(names, "../stray.safetensors")}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(tree))
    assert "stray.safetensors is missing" in refusal(tmp_path / "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_read(tmp_path, name):
    saved(V3, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, tmp_path / name)
    assert f"{name} is a pickle" in refusal(tmp_path) and "never read" in refusal(tmp_path)


def test_a_model_that_comes_as_code_is_refused_with_the_reason_and_the_way_out(tmp_path):
    saved(V3, tmp_path)
    change(
        tmp_path / "config.json",
        architectures=["StrangeForCausalLM"],
        auto_map={"AutoModelForCausalLM": "strange.Strange"},
    )
    message = refusal(tmp_path)
    assert "Python code" in message and "never run" in message and "DeepseekV3ForCausalLM" in message


def test_tensors_of_experts_are_named_when_missing_or_too_many(tmp_path):
    saved(V3, tmp_path)
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    retensor(tmp_path, lambda held: held.pop(name))
    assert name in refusal(tmp_path)
    saved(V3, tmp_path)
    retensor(tmp_path, lambda held: held.update({name.replace("7", "8"): held[name].clone()}))
    assert f"tensor {name.replace('7', '8')} has no place" in refusal(tmp_path)


@pytest.mark.parametrize(
    "key, value", [("topk_method", "greedy"), ("scoring_func", "softmax"), ("n_group", 0)]
)
def test_a_mixture_of_another_kind_is_refused(tmp_path, key, value):
    saved(V3, tmp_path)
    change(tmp_path / "config.json", **{key: value})
    if key == "n_group":
        weights.load(tmp_path)  # none is one
    else:
        assert f"{key} = {value!r} is not supported for deepseek_v3" in refusal(tmp_path)


def test_reading_takes_little_more_memory_than_the_weights(tmp_path):
    """A mixture of 100 MB in single precision, read in a process of its own; what it holds before is subtracted."""
    experts = replace(V3.experts, count=64, groups=8, intermediate_size=128, shared_size=128)
    config = replace(V3, hidden_size=256, layers=4, experts=experts)
    saved(config, tmp_path)
    code = (
        "import sys, resource, torch\n"
        "from pathlib import Path\n"
        "from limbeck.model import weights\n"
        "weights.load(Path(sys.argv[2]))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = weights.load(Path(sys.argv[1]))\n"
        "print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    (tmp_path / "small").mkdir()
    saved(V3, tmp_path / "small")
    told = subprocess.run(
        [sys.executable, "-c", code, tmp_path, tmp_path / "small"], capture_output=True, text=True, check=True
    )
    before, after = map(int, told.stdout.split())
    assert 1024 * (after - before) < 1.2 * 4 * config.parameters
