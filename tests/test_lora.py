"""LoRA: gradients = autograd's through base + s B A, sampler = learner, resumed = uninterrupted, and PEFT in
and out."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from torch.func import functional_call

from limbeck.config.load import load
from limbeck.config.parts import TARGETS, Optimizer
from limbeck.config.parts import LoRA as Settings
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import peft, weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.families import FAMILIES
from limbeck.model.kv_cache import Packed
from limbeck.model.lora import LoRA
from limbeck.model.ops import devices, place
from limbeck.pipeline.worker import run_job
from limbeck.train.batch import pack, to_samples
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.train.reward_model import RewardModelLearner
from limbeck.train.scorer import Scorer
from limbeck.types import LimbeckError, Sample

VOCABULARY = 40


def samples(count: int = 6) -> list[Sample]:
    random = np.random.default_rng(0)
    return [Sample(random.integers(0, VOCABULARY, 5 + 3 * i), start=i % 3) for i in range(count)]


def learner_of(model, lora: LoRA | None, **settings) -> Learner:
    return Learner(model, Optimizer(**{"learning_rate": 0.01, **settings}), 10, lora=lora)


def train(learner: Learner, steps: int) -> None:
    for step in range(steps):
        learner.update(pack(samples(3 + step % 3), 64), CrossEntropy())


@torch.no_grad()
def scramble(lora: LoRA, seed: int = 0) -> None:
    """Draw A and B at random, as if learned, and merge them."""
    random = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters().values():
        parameter.normal_(0, 0.2, generator=random)
    lora.merge()


def squares(values_M: torch.Tensor, batch) -> tuple[torch.Tensor, dict]:
    """A loss of values that want to be 1."""
    return (values_M.float() - 1).square().mean(), {}


# ---------------------------------------------------------------- the forward and the backward pass


@pytest.mark.parametrize("targets", ["all", ("q", "v", "down"), ("k_proj",), ("gate", "o")])
def test_gradients_equal_those_of_autograd_through_base_and_adapters(decoder, targets):
    model = decoder(torch.float64, vocab_size=VOCABULARY)
    lora = LoRA(model, Settings(rank=4, alpha=6, targets=targets), "seed")
    scramble(lora)
    learner = learner_of(model, lora)
    (batch,) = pack(samples(), 1 << 20)
    CrossEntropy()(learner.forward(batch)[0], batch)[0].backward()
    found = {name: parameter.grad for name, parameter in lora.parameters().items()}

    plain, adapters = lora.base(), {n: p.detach().requires_grad_() for n, p in lora.parameters().items()}
    merged = {}
    for name, layer in lora.layers.items():
        a_SC, b_PR = adapters[f"{name}.lora_A"], adapters[f"{name}.lora_B"]
        rows = layer.adapter.base_OC.unbind()
        for matrix in layer.adapter.matrices:
            added = layer.adapter.scale * b_PR[matrix.ups] @ a_SC[matrix.ranks]
            rows = [
                *rows[: matrix.rows.start],
                *(added + torch.stack(rows[matrix.rows])),
                *rows[matrix.rows.stop :],
            ]
        merged[f"{name}.weight"] = torch.stack(list(rows))
    hidden_NC = functional_call(plain, merged, (batch.tokens_N, batch.context))
    logits_MV = hidden_NC[batch.predict_M] @ plain.head.weight.T
    logprobs_M = torch.log_softmax(logits_MV, -1).gather(1, batch.targets_M.unsqueeze(1)).squeeze(1)
    CrossEntropy()(logprobs_M, batch)[0].backward()
    for name, parameter in adapters.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-12, rtol=1e-9)
        assert parameter.grad.abs().max() > 0


def test_before_the_first_update_the_model_is_its_base(decoder):
    model = decoder(vocab_size=VOCABULARY)
    (batch,) = pack(samples(), 1 << 20)
    before = Scorer(model).logprobs([batch])[0]
    lora = LoRA(model, Settings(), "seed")
    learner = learner_of(model, lora)
    assert torch.equal(learner.logprobs([batch])[0], before)
    lora.merge()
    assert torch.equal(learner.logprobs([batch])[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_merged_in_place_from_the_base_and_rounded_once(decoder, dtype):
    model = decoder(dtype, vocab_size=VOCABULARY)
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    base = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    lora = LoRA(model, Settings(rank=4, alpha=8), 0)
    train(learner_of(model, lora), 3)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
    adapted = set()
    for part, a_RC, b_PR in lora.matrices():
        assert a_RC.dtype == b_PR.dtype == torch.float32
        wanted = torch.addmm(part.place(base[part.ours]).float(), b_PR, a_RC, alpha=2.0).to(dtype)
        assert torch.equal(part.place(model.get_parameter(part.ours)), wanted)
        assert not torch.equal(wanted, part.place(base[part.ours]))
        adapted.add(part.ours)
    for name, weight in model.named_parameters():
        assert name in adapted or torch.equal(weight, base[name])


def test_tied_embeddings_stay_as_they_are(decoder):
    model = decoder(vocab_size=VOCABULARY, tied=True)
    before = model.embed.weight.detach().clone()
    train(learner_of(model, LoRA(model, Settings(rank=2), 0)), 2)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, before)


def test_only_the_named_rows_of_a_fused_weight_change(decoder):
    model = decoder(vocab_size=VOCABULARY)
    before = model.blocks[0].attention.qkv.weight.detach().clone()
    train(learner_of(model, LoRA(model, Settings(rank=4, targets=("q", "v")), 0)), 2)
    changed = (model.blocks[0].attention.qkv.weight != before).any(1)
    assert changed.tolist() == [True] * 32 + [False] * 16 + [True] * 16


def test_initial_adapters_do_not_depend_on_which_others_there_are(decoder):
    few, all_of_them = (
        LoRA(decoder(), Settings(rank=4, targets=targets), "seed") for targets in (("v", "down"), "all")
    )
    found = {part.theirs: a_RC for part, a_RC, _ in all_of_them.matrices()}
    for part, a_RC, b_PR in few.matrices():
        assert torch.equal(a_RC, found[part.theirs]) and not b_PR.any()


def test_the_base_shares_its_weights_and_does_not_learn(decoder):
    model = decoder(vocab_size=VOCABULARY)
    (batch,) = pack(samples(), 1 << 20)
    before = Scorer(model).logprobs([batch])[0]
    lora = LoRA(model, Settings(rank=4), 0)
    reference = lora.base()
    learner = learner_of(model, lora)
    train(learner, 3)
    assert torch.equal(Scorer(reference).logprobs([batch])[0], before)
    assert not torch.equal(learner.logprobs([batch])[0], before)
    own = {weight.data_ptr() for weight in reference.parameters()}
    held = {weight.data_ptr() for weight in model.parameters()}
    held |= {layer.adapter.base_OC.data_ptr() for layer in lora.layers.values()}
    assert own <= held


@pytest.mark.parametrize("family", ["qwen3moe", "deepseek-v2"])
def test_gradients_of_latent_attention_and_beside_experts_equal_finite_differences(tmp_path, family):
    pytest.importorskip("transformers")
    checkpoints.save(family, tmp_path, VOCABULARY)
    model = weights.load(tmp_path, torch.float64)
    lora = LoRA(model, Settings(rank=2, alpha=2), 0)
    scramble(lora)
    learner = learner_of(model, lora)
    (batch,) = pack(samples(), 1 << 20)

    def loss() -> torch.Tensor:
        return CrossEntropy()(learner.forward(batch)[0], batch)[0]

    loss().backward()
    random = torch.Generator().manual_seed(0)
    for name, parameter in list(lora.parameters().items())[:4]:
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=random)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                lora.merge()
                values.append(loss().item())
                parameter -= sign * 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-5), name


def test_gradients_in_bfloat16_are_near_those_in_float32_and_are_summed_in_float32(decoder):
    random = torch.Generator().manual_seed(1)
    x_NC, grad_NO = (torch.randn(50, size, generator=random).bfloat16() for size in (32, 64))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = decoder(torch.bfloat16).to(dtype)  # the same weights
        lora = LoRA(model, Settings(rank=4), 0)
        scramble(lora)
        for part in range(2):
            rows = slice(25 * part, 25 * part + 25)
            model.blocks[0].attention.qkv(x_NC[rows].to(dtype)).backward(grad_NO[rows].to(dtype))
        adapter = model.blocks[0].attention.qkv.adapter
        gradients.append((adapter.a_SC.grad, adapter.b_PR.grad))
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < (exact - rounded).norm() < 0.01 * exact.norm()


# ---------------------------------------------------------------- the learner


def test_recomputed_gradients_are_the_same(decoder):
    gradients = []
    for recompute in (False, True):
        model = decoder(vocab_size=VOCABULARY)
        lora = LoRA(model, Settings(rank=4), 0)
        scramble(lora)
        learner = Learner(model, Optimizer(), 1, recompute, lora)
        learner.accumulate(pack(samples(), 64), CrossEntropy())
        gradients.append([p.grad for p in lora.parameters().values()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_head_learns_beside_adapters_and_is_part_of_the_checkpoint(decoder, dtype):
    def begin() -> RewardModelLearner:
        model = decoder(dtype, vocab_size=VOCABULARY)
        lora = LoRA(model, Settings(rank=4), 0)
        return RewardModelLearner(model, Optimizer(learning_rate=0.01), 10, lora)

    learner = begin()
    for _ in range(2):
        learner.update(pack(samples(), 1 << 20), squares)
    resumed = begin()
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert learner.model.value.weight.abs().max() > 0
    for one in (learner, resumed):
        one.update(pack(samples(), 1 << 20), squares)
    for name, weight in learner.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name
    assert set(learner.state_dict()["model"]) == {"value.weight", *learner.lora.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_six_updates_equal_three_and_a_restart_and_three(decoder, dtype, tmp_path):
    def begin() -> Learner:
        model = decoder(dtype, vocab_size=VOCABULARY)
        return learner_of(model, LoRA(model, Settings(rank=4, learning_rate=0.02), 0))

    whole = begin()
    train(whole, 3)
    state = whole.state_dict()
    torch.save(state, tmp_path / "state.pt")
    for step in range(3, 6):
        whole.update(pack(samples(3 + step % 3), 64), CrossEntropy())
    resumed = begin()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        resumed.update(pack(samples(3 + step % 3), 64), CrossEntropy())
    for name, weight in whole.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name
    adapters = sum(p.numel() for p in whole.lora.parameters().values())
    saved = sum(p.numel() for p in state["model"].values())
    assert saved == adapters < sum(p.numel() for p in whole.model.parameters())


def test_the_balance_of_experts_and_their_weights_stay_as_they_are(tmp_path):
    pytest.importorskip("transformers")
    checkpoints.save("deepseek-v3", tmp_path, VOCABULARY)
    model = weights.load(tmp_path)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    lora = LoRA(model, Settings(rank=4), 0)
    train(learner_of(model, lora, balance_rate=0.1), 2)
    adapted = {part.ours for part, _, _ in lora.matrices()}
    assert all(".attention." in name for name in adapted)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != (name in adapted), name


def test_the_learning_rate_of_adapters_takes_the_place_of_the_optimizers(decoder):
    model = decoder()
    learner = learner_of(model, LoRA(model, Settings(rank=4, learning_rate=0.5), 0), learning_rate=0.1)
    assert learner.settings.learning_rate == 0.5


def test_mistakes_are_one_sentence(decoder):
    with pytest.raises(LimbeckError, match=r"lora.rank = 17 .*k_proj has, which is 16 x 32; give at most 16"):
        LoRA(decoder(), Settings(rank=17), 0)
    with pytest.raises(
        LimbeckError, match="lora.targets: qq is no linear layer .* q, k, v, o, gate, up, down"
    ):
        LoRA(decoder(), Settings(targets=("qq",)), 0)


def test_the_names_of_layers_are_those_of_all_families():
    layers = r"attention\.(qkv|q|out|q_latent|q_full|q_up|kv_up)|ffn\.(gate_up|up|down)"
    found = set()
    for family in FAMILIES.values():
        for module, sources in family.names.items():
            if re.fullmatch(layers, module):
                found |= {source.rpartition(".")[2].removesuffix("_proj") for source in sources}
    assert found == set(TARGETS)


# ---------------------------------------------------------------- the sampler


@pytest.mark.parametrize("device", ["cpu", devices.PLAIN])
def test_sampler_and_learner_read_the_same_weights(decoder, tokenizer, clock, device):
    model = place(decoder(), device)
    engine = Engine(model, tokenizer)
    learner = learner_of(model, LoRA(model, Settings(rank=4), 0))
    train(learner, 2)
    engine.load_weights(learner.weights())
    groups = engine.rollout(clock.problems("train")[:3], 4, SamplingParams(1.0, 1.0, 24), "seed")
    advantages = [np.ones(len(group.completions)) for group in groups]
    rolled = to_samples(groups, advantages, keep_mask=False)
    (batch,) = pack(rolled, 1 << 20)
    assert engine.model is learner.model
    torch.testing.assert_close(learner.logprobs([batch])[0], batch.logprobs_M, atol=2e-5, rtol=0)
    with torch.enable_grad():
        torch.testing.assert_close(learner.forward(batch)[0].detach(), batch.logprobs_M, atol=2e-5, rtol=0)


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize(
    "family, targets",
    [
        ("llama3", "all"), ("qwen2", ("q", "v")), ("qwen3", "all"), ("qwen3moe", "all"),
        ("deepseek-v2", "all"), ("deepseek-v2-lite", ("q", "kv_a_proj_with_mqa", "kv_b")),
    ],
)  # fmt: skip
def test_peft_loads_what_is_saved_and_what_peft_saves_is_merged(tmp_path, family, targets):
    reference = pytest.importorskip("peft")
    theirs = checkpoints.save(family, tmp_path / "base", VOCABULARY)
    ours = weights.load(tmp_path / "base")
    lora = LoRA(ours, Settings(rank=4, alpha=12, targets=targets), 0)
    scramble(lora)
    peft.save(lora, tmp_path / "adapter")
    adapted = reference.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    row = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, 50))
    with torch.no_grad():
        expected = adapted(row.unsqueeze(0)).logits[0]
        found = ours.head(ours(row, Packed([50])))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    names = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(names) == 2 * len(list(lora.matrices()))

    adapted.save_pretrained(tmp_path / "theirs")
    merged = weights.load(tmp_path / "base")
    peft.merge(merged, tmp_path / "theirs")
    for name, weight in ours.named_parameters():
        assert torch.equal(merged.get_parameter(name), weight), name


def test_equal_adapters_give_equal_bytes(decoder, tmp_path):
    for name in ("one", "other"):
        lora = LoRA(decoder(), Settings(rank=4), 0)
        scramble(lora)
        peft.save(lora, tmp_path / name)
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora is True, and only False is read"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only 'LORA' is read"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"lora_alpha": None}, "no settings of a LoRA adapter"),
    ],
)
def test_an_adapter_of_another_method_is_refused(decoder, tmp_path, change, message):
    peft.save(LoRA(decoder(), Settings(rank=4), 0), tmp_path)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    (tmp_path / peft.CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(LimbeckError, match=message):
        peft.merge(decoder(), tmp_path)


def test_an_adapter_of_another_model_is_refused(decoder, tmp_path):
    peft.save(LoRA(decoder(layers=3), Settings(rank=4), 0), tmp_path / "deeper")
    with pytest.raises(LimbeckError, match=r"layers.2.*has no place in this model"):
        peft.merge(decoder(), tmp_path / "deeper")
    peft.save(LoRA(decoder(hidden_size=64), Settings(rank=4), 0), tmp_path / "wider")
    with pytest.raises(LimbeckError, match="but the weight is"):
        peft.merge(decoder(), tmp_path / "wider")
    with pytest.raises(LimbeckError, match="adapter_config.json is missing"):
        peft.merge(decoder(), tmp_path)


# ---------------------------------------------------------------- stages

RECIPE = """
name: adapted
threads: 1
problems:
  clock: {source: miniature, modulus: 3, numbers: 3, largest: 2}
stages:
  base: {kind: load, path: model, licence: own}
  zero:
    kind: rl
    model: base
    problems: {clock: 1}
    rewards: {language: 1}
    steps: 3
    policy: {prompts_per_step: 3, group_size: 3, kl_coef: 0.01, zero_variance: keep, mask_truncated: false}
    sampling: {max_new_tokens: 8}
    lora: {rank: 4, alpha: 8, learning_rate: 0.05}
    save_every: 0.001
  traces:
    {kind: sample, model: zero, problems: {clock: 1}, prompts: 16, samples: 1, correct: false,
     wellformed: false, sampling: {max_new_tokens: 8}}
  tuned:
    kind: sft
    model: zero
    rows: {traces: 1}
    batch_tokens: 128
    lora: {rank: 2, targets: [q, v]}
    optimizer: {learning_rate: 0.02}
    save_every: 0.001
  preferred:
    kind: dpo
    model: base
    pairs: {pairs.jsonl: 1}
    licence: own
    batch_tokens: 128
    lora: {rank: 4}
    optimizer: {learning_rate: 0.02}
    save_every: 0.001
  small:
    kind: distill
    model: base
    teachers: {clock: tuned}
    problems: {clock: 1}
    steps: 2
    prompts_per_step: 3
    sampling: {max_new_tokens: 8}
    lora: {rank: 4}
    save_every: 0.001
  judge:
    kind: reward
    model: base
    rows: pairs.jsonl
    licence: own
    batch_pairs: 4
    held_out: 0.4
    lora: {rank: 4}
    save_every: 0.001
"""
LEARNED = ("zero", "tuned", "preferred", "small", "judge")


class Impatient:
    """A stage is asked to stop after every step."""

    def __init__(self):
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked > 1


def carry_out(recipe: Path, home: Path, *overrides: str, stopping: bool = False) -> dict[str, Path]:
    """Carry out all stages in this process; the folders of their artifacts by name."""
    run = tiny.open_run(recipe, home, *overrides)
    for name in run.graph.nodes:
        run.graph.refresh()
        node = run.graph.nodes[name]
        if node.artifact:
            continue
        event = {"event": "failed", "code": 75}
        while event["event"] == "failed":
            assert event["code"] == 75, event
            job = run._job(node, run.graph.shorter(node))
            event = run_job(replace(job, stopping=Impatient()) if stopping else job)
        manifest = run._manifest(node, event["outcome"])
        artifact = run.store.finish(run.store.partial(node.kind, node.key), manifest)
        run.graph.nodes[name] = replace(node, artifact=artifact)
    return {name: node.artifact.folder for name, node in run.graph.nodes.items()}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, tokenizer) -> tuple[Path, dict[str, Path]]:
    """A recipe whose learning stages all train adapters, and the folders of their artifacts."""
    folder = tmp_path_factory.mktemp("adapted")
    (folder / "adapted.yaml").write_text(RECIPE)
    sizes = ModelConfig("llama", tokenizer.size, 16, 1, 2, 1, 8, 32, max_positions=128)
    model = Decoder(sizes).initialize(0)
    weights.save(model, folder / "model", tokenizer)
    rows = [
        {"prompt": f"{i} 2 1 mod 3", "chosen": "1 2 3", "rejected": "3 2", "licence": "own"}
        for i in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "adapted.yaml", carry_out(folder / "adapted.yaml", folder / "runs")


@pytest.mark.parametrize("stage", LEARNED)
def test_every_learning_stage_writes_the_merged_model_and_its_adapter(adapted, stage):
    _, folders = adapted
    before = weights.load(folders["zero" if stage == "tuned" else "base"] / "model")
    after = weights.load(folders[stage] / "model")
    assert not torch.equal(before.blocks[0].attention.qkv.weight, after.blocks[0].attention.qkv.weight)
    peft.merge(before, folders[stage] / "adapter")
    for name, weight in after.named_parameters():
        assert torch.equal(before.get_parameter(name), weight), name


@pytest.mark.slow
def test_stages_stopped_after_every_step_end_with_the_same_bytes(adapted, tmp_path):
    recipe, folders = adapted
    again = carry_out(recipe, tmp_path, stopping=True)
    for name, folder in folders.items():
        digests = [json.loads((f / "manifest.json").read_text())["digest"] for f in (folder, again[name])]
        assert digests[0] == digests[1], name


def beginning(recipe: Path) -> Path:
    """A recipe of the first learning stage alone."""
    tree = yaml.safe_load(recipe.read_text())
    tree["stages"] = {name: tree["stages"][name] for name in ("base", "zero")}
    path = recipe.with_name("beginning.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def test_more_steps_go_on_from_the_adapters_and_end_with_the_same_bytes(adapted, tmp_path):
    recipe = beginning(adapted[0])
    constant = "stages.zero.optimizer.schedule=constant"
    carry_out(recipe, tmp_path / "short", constant)
    manifests = []
    for home in ("short", "long"):
        folders = carry_out(recipe, tmp_path / home, constant, "stages.zero.steps=5")
        manifests.append(json.loads((folders["zero"] / "manifest.json").read_text()))
    assert manifests[0]["digest"] == manifests[1]["digest"]
    assert "continued" in str(manifests[0]) and "continued" not in str(manifests[1])


def test_adapters_of_weights_in_bfloat16_are_kept_in_float32(adapted, tmp_path):
    recipe = beginning(adapted[0])
    folders = carry_out(recipe, tmp_path, "stages.zero.precision=bfloat16", stopping=True)
    after = weights.load(folders["zero"] / "model", torch.bfloat16)
    before = weights.load(folders["base"] / "model", torch.bfloat16)
    peft.merge(before, folders["zero"] / "adapter")
    adapter = load_file(folders["zero"] / "adapter" / peft.WEIGHTS)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    for name, weight in after.named_parameters():
        assert torch.equal(before.get_parameter(name), weight), name


def test_an_adapter_is_merged_when_its_model_is_loaded(adapted, tmp_path):
    recipe, folders = adapted
    text = "name: merged\nstages:\n  base: {kind: load, path: model, licence: own, adapter: ADAPTER}\n"
    merged = recipe.parent / "merged.yaml"
    merged.write_text(text.replace("ADAPTER", str(folders["zero"] / "adapter")))
    loaded = carry_out(merged, tmp_path)["base"]
    files = [folder / "model" / "model.safetensors" for folder in (loaded, folders["zero"])]
    assert files[0].read_bytes() == files[1].read_bytes()
    key = tiny.open_run(merged, tmp_path).graph.nodes["base"].key
    merged.write_text(text.replace("ADAPTER", str(folders["preferred"] / "adapter")))
    assert tiny.open_run(merged, tmp_path).graph.nodes["base"].key != key
    merged.write_text(text.replace("ADAPTER", "nowhere"))
    with pytest.raises(LimbeckError, match="stages.base.adapter: nowhere is no directory"):
        tiny.open_run(merged, tmp_path)


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages.tuned.optimizer.name=muon", "stages.tuned.lora: adapters are trained by AdamW"),
        ("stages.tuned.lora.rank=0", "stages.tuned.lora.rank: input should be greater"),
        ("stages.tuned.lora.ranks=2", "unknown key stages.tuned.lora.ranks; did you mean rank"),
        ("stages.tuned.lora.targets=[qq]", "stages.tuned.lora.targets names qq, which is no linear layer"),
        ("stages.tuned.lora.targets=upp", "stages.tuned.lora.targets names upp, .*; did you mean up"),
        ("stages.tuned.lora.targets=3", "stages.tuned.lora.targets"),
    ],
)
def test_mistakes_in_a_recipe_are_one_sentence(adapted, override, message):
    recipe, _ = adapted
    with pytest.raises(LimbeckError, match=message) as caught:
        load(recipe, [override])
    assert len(str(caught.value)) < 300
