"""Families that transformers does not hold whole, built from its parts; and checkpoints of mixtures.

N tokens of a row · V vocabulary.
"""

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

V3_EXPERTS = Experts(
    8,
    2,
    12,
    12,
    sigmoid=True,
    balanced=True,
    normalize=True,
    scale=2.5,
    groups=4,
    top_groups=2,
    dense=(0,),
)
V3 = ModelConfig(
    "deepseek_v3", 48, 32, 3, 4, 4, 4, 48, tied=False, latent=Latent(12, 8, 4, 8, 16), experts=V3_EXPERTS
)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """A model of random weights; parts of transformers come uninitialised."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            center = 1 if weight.ndim == 1 else 0  # norms near one
            weight.copy_(torch.randn_like(weight) * 0.15 + center)
    return model.eval()


def logits(decoder: Decoder, row: torch.Tensor) -> torch.Tensor:
    """The logits of a row, [N, V]."""
    with torch.no_grad():
        return decoder.head(decoder(row, Packed([len(row)])))


def tokens(count: int = 60) -> torch.Tensor:
    """A row of random tokens, [N]."""
    return torch.randint(1, 48, (count,), generator=torch.Generator().manual_seed(3))


def assert_same_logits(ours: Decoder, theirs: torch.nn.Module) -> None:
    """Both models compute the same of a row of tokens."""
    with torch.no_grad():
        expected = theirs(tokens()[None]).logits[0]
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=1e-4, rtol=0)


def saved(config: ModelConfig, directory: Path, seed: int = 0) -> Decoder:
    """A random model, and its directory written."""
    model = Decoder(config).initialize(seed)
    weights.save(model, directory)
    return model


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


def refusal(directory: Path) -> str:
    """The one sentence with which a directory is refused."""
    with pytest.raises(LimbeckError) as caught:
        weights.load(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- families built from parts


def test_deepseek_moe_is_llamas_attention_and_v2s_experts(tmp_path):
    """DeepSeekMoE, which transformers holds in two halves."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    sizes = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    llama = transformers.LlamaConfig(**sizes, max_position_embeddings=256, pad_token_id=None)
    theirs = transformers.LlamaForCausalLM(llama)
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
    assert_same_logits(ours, theirs)
    weights.save(ours, tmp_path)
    again = weights.load(tmp_path)
    assert again.config == config
    assert torch.equal(logits(again, tokens()), logits(ours, tokens()))


def test_hunyuan_large_shares_keys_and_leaves_its_one_experts_weight_alone(tmp_path):
    """transformers' smaller Hunyuan, whose every second layer is handed the first's keys and values."""
    settings = transformers.HunYuanMoEV1Config(
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
    theirs = shaken(transformers.HunYuanMoEV1ForCausalLM(settings))
    for layer in theirs.model.layers:
        leave_weight(layer.mlp.gate)
    for first, second in zip(theirs.model.layers[::2], theirs.model.layers[1::2], strict=True):
        share(first.self_attn.k_proj, second.self_attn.k_proj)
        share(first.self_attn.v_proj, second.self_attn.v_proj)
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
    assert_same_logits(ours, theirs)


def leave_weight(gate: torch.nn.Module) -> None:
    """Let a gate return its one expert's share, which it would make 1."""

    def forward(x):
        shares = gate.wg(x.reshape(-1, 32)).softmax(-1)
        return None, *shares.topk(1)

    gate.forward = forward


def share(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """Let the second module return the first one's last output."""
    outputs = {}
    first.register_forward_hook(lambda module, inputs, output: outputs.update(last=output))
    second.forward = lambda x: outputs["last"]


def copy_from(theirs: torch.nn.Module, ours: Decoder) -> None:
    """Copy all weights, by the names of a checkpoint."""
    tensors = theirs.state_dict()
    mine = dict(ours.named_parameters())
    for part in weights.parts(ours):
        place = part.place(mine[part.ours].data)
        place.copy_(named_as_in_a_checkpoint(tensors, part.theirs))


def named_as_in_a_checkpoint(tensors: dict, name: str) -> torch.Tensor:
    """A tensor by its name in a checkpoint; in memory transformers stacks the experts, [E, ...]."""
    stem, _, rest = name.partition(".experts.")
    if not rest:
        return tensors[name]
    number, kind, _ = rest.split(".")
    if kind == "down_proj":
        return tensors[f"{stem}.experts.down_proj"][int(number)]
    gate, up = tensors[f"{stem}.experts.gate_up_proj"][int(number)].chunk(2)
    return up if kind == "up_proj" else gate


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("tied", [True, False])
def test_modules_that_look_ahead_travel_and_transformers_leaves_them(tmp_path, tied):
    """Multi-token prediction is saved and loaded; transformers drops it."""
    model = saved(replace(V3, predicted=1, tied=tied), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert "model.layers.3.eh_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert weights.digest(weights.load(tmp_path)) == weights.digest(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_logits(model, theirs)
    again = tmp_path / "again"
    theirs.save_pretrained(again)
    change(again / "config.json", num_nextn_predict_layers=1)  # announced, as by fine-tuned copies of V3
    assert weights.load(again).config.predicted == 0


def test_a_repeated_embedding_of_a_module_that_looks_ahead_is_no_harm(tmp_path):
    """V3's checkpoints repeat embedding and head in each module."""
    model = saved(replace(V3, predicted=1), tmp_path)

    def repeat(tensors: dict) -> None:
        tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()

    retensor(tmp_path, repeat)
    assert weights.digest(weights.load(tmp_path)) == weights.digest(model)


def test_fp8_weights_are_multiplied_by_their_blocks_scales(tmp_path):
    """One scale for 128 x 128 weights; a missing one is an error."""
    config = replace(V3, hidden_size=160, intermediate_size=300, vocab_size=48)
    saved(config, tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    plain = {}

    def quantize(tensors: dict) -> None:
        for kind in (name, "model.layers.1.mlp.experts.3.gate_proj.weight"):
            rows, columns = tensors[kind].shape
            scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
            tensors[kind] = (tensors[kind] * 100).to(torch.float8_e4m3fn)
            tensors[f"{kind}_scale_inv"] = scale
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            plain[kind] = tensors[kind].float() * wide[:rows, :columns]

    retensor(tmp_path, quantize)
    model = weights.load(tmp_path)
    mine = dict(model.named_parameters())
    for part in weights.parts(model):
        if part.theirs in plain:
            assert torch.equal(part.place(mine[part.ours]), plain[part.theirs])
    retensor(tmp_path, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    assert f"{name} is in FP8, but {name}_scale_inv is missing" in refusal(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path, monkeypatch):
    """An index lists a tensor for a file that does not hold it."""
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
    """A path in an index counts by its last part alone."""
    saved(V3, tmp_path / "model")
    directory = tmp_path / "model"
    stray = tmp_path / "stray.safetensors"
    (directory / "model.safetensors").rename(stray)
    tree = {"weight_map": dict.fromkeys(load_file(stray), "../stray.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(tree))
    assert "stray.safetensors is missing" in refusal(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_read(tmp_path, name):
    """A directory whose only weights are a pickle."""
    saved(V3, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, tmp_path / name)
    message = refusal(tmp_path)
    assert f"{name} is a pickle" in message
    assert "never read" in message


def test_a_model_that_comes_as_code_is_refused_with_the_reason_and_the_way_out(tmp_path):
    """An architecture that config.json maps to Python code."""
    saved(V3, tmp_path)
    change(
        tmp_path / "config.json",
        architectures=["StrangeForCausalLM"],
        auto_map={"AutoModelForCausalLM": "strange.Strange"},
    )
    message = refusal(tmp_path)
    assert "Python code" in message
    assert "never run" in message
    assert "DeepseekV3ForCausalLM" in message


def test_tensors_of_experts_are_named_when_missing_or_too_many(tmp_path):
    """The eighth of eight experts, and a ninth."""
    saved(V3, tmp_path)
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    retensor(tmp_path, lambda tensors: tensors.pop(name))
    assert name in refusal(tmp_path)
    saved(V3, tmp_path)
    extra = name.replace("7", "8")
    retensor(tmp_path, lambda tensors: tensors.update({extra: tensors[name].clone()}))
    assert f"tensor {extra} has no place" in refusal(tmp_path)


@pytest.mark.parametrize(
    "key, value", [("topk_method", "greedy"), ("scoring_func", "softmax"), ("n_group", 0)]
)
def test_a_mixture_of_another_kind_is_refused(tmp_path, key, value):
    """A switch of V3's router with another value."""
    saved(V3, tmp_path)
    change(tmp_path / "config.json", **{key: value})
    if key == "n_group":
        weights.load(tmp_path)  # none is one
    else:
        assert f"{key} = {value!r} is not supported for deepseek_v3" in refusal(tmp_path)


def test_reading_takes_little_more_memory_than_the_weights(tmp_path):
    """A mixture of 100 MB in fp32, read in a process of its own, whose memory before is subtracted."""
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
    small = tmp_path / "small"
    small.mkdir()
    saved(V3, small)
    command = [sys.executable, "-c", code, tmp_path, small]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert 1024 * (after - before) < 1.2 * 4 * config.parameters
