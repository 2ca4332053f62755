"""Nothing learns from numbers that are not finite, and no model is made that would give them."""

from __future__ import annotations

import ast
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from trainers import train_grpo

from limbeck.config.load import load
from limbeck.config.recipe import RL, Optimizer, Policy, Sampling
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import kernels
from limbeck.model.config import Latent, ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.kv_cache import Packed
from limbeck.pipeline.run import _failure
from limbeck.pipeline.worker import run_job
from limbeck.run_log import RunLog, read_metrics
from limbeck.tasks.mixture import Mixture
from limbeck.train import dpo, losses, reward_model
from limbeck.train.batch import Batch, pack
from limbeck.train.checkpoint import Checkpoint
from limbeck.train.divergence import TopK
from limbeck.train.dpo import DPO
from limbeck.train.learned_rewards import LearnedRewards
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy, Distillation, PolicyGradient, SpanDistance
from limbeck.train.reward_model import BradleyTerry, RewardModelLearner
from limbeck.train.sft import SFTTrainer
from limbeck.types import LimbeckError, Sample

pytestmark = pytest.mark.slow

VOCABULARY, STEPS = 40, 9
SETTINGS = Optimizer(name="muon", learning_rate=0.01)
ONE_SENTENCE = r"optimiser step 2 of 9: [^\n;]* not finite; [^\n;]+; the last checkpoint stays as it is"


def samples(**given) -> list[Sample]:
    """Two completions of one prompt, and one of another: all that any loss asks for."""
    random = np.random.default_rng(3)
    made = []
    for i, (start, length) in enumerate(((3, 8), (3, 6), (4, 9))):
        tokens, rest = random.integers(0, VOCABULARY, length), length - start
        tokens[:start] = np.arange(start) + start
        logprobs = -random.exponential(3.0, rest).astype(np.float32)
        made.append(replace(Sample(tokens, start, (-1.0) ** i, logprobs, logprobs - 0.1), **given))
    return made


def pairs() -> list[Sample]:
    return [replace(s, pair=sign) for s, sign in zip(samples()[:2], (1, -1), strict=True)]


def halves() -> list[Batch]:
    at_end = [
        replace(
            s,
            learned=np.arange(s.start, len(s.tokens)) == len(s.tokens) - 1,
            logprobs=s.logprobs[:1],
            reference=None,
        )
        for s in samples()
    ]
    pair = [
        replace(half, start=1, learned=_last(half), pair=sign)
        for half, sign in zip(at_end[:2], (1, -1), strict=True)
    ]
    return pack(pair, 1 << 20)


def _last(sample: Sample) -> np.ndarray:
    return np.arange(1, len(sample.tokens)) == len(sample.tokens) - 1


def taught(batches: list[Batch], build: Callable[..., Decoder], labels: bool) -> list[Batch]:
    """With a teacher's states, or with its labels."""
    teacher = Learner(build(vocab_size=VOCABULARY, seed=7), SETTINGS, 1)
    shown = [teacher.states(batch) for batch in batches]
    if labels:
        logp_MV = [torch.log_softmax(s.hidden_MC @ s.head_VC.T, -1) for s in shown]
        shown = [
            TopK(top.indices, top.values, (1 - top.values.exp().sum(1)).log())
            for top in (logp.topk(3) for logp in logp_MV)
        ]
    return [replace(batch, teacher=teacher) for batch, teacher in zip(batches, shown, strict=True)]


# Every loss: how it is made, what learns by it, and the batches that it sees.
LOSSES = {
    "CrossEntropy": (CrossEntropy, Learner, lambda build: pack(samples(), 1 << 20)),
    "PolicyGradient": (
        lambda: PolicyGradient(Policy(kl_coef=0.1)),
        Learner,
        lambda build: pack(samples(), 1 << 20),
    ),
    "PolicyGradient-r1": (
        lambda: PolicyGradient(Policy(preset="r1", off_policy_threshold=0.5)),
        Learner,
        lambda build: pack(samples(), 1 << 20),
    ),
    "DPO": (lambda: DPO(0.1), Learner, lambda build: pack(pairs(), 1 << 20)),
    "DPO-normalized": (lambda: DPO(0.1, True), Learner, lambda build: pack(pairs(), 1 << 20)),
    "SpanDistance": (
        SpanDistance,
        Learner,
        lambda build: pack(
            [replace(s, spans=np.arange(len(s.tokens) - s.start)) for s in samples()], 1 << 20
        ),
    ),
    "BradleyTerry": (BradleyTerry, RewardModelLearner, lambda build: halves()),
    **{
        f"Distillation-{kind}-{'labels' if labels else 'states'}": (
            lambda kind=kind: Distillation(kind),
            Learner,
            lambda build, labels=labels: taught(pack(samples(), 1 << 20), build, labels),
        )
        for kind in ("forward", "reverse", "jsd")
        for labels in (False, True)
    },
}


def state(learner: Learner) -> dict[str, bytes]:
    """Weights and moments as bytes."""
    found = {name: w.numpy().tobytes() for name, w in learner.weights().items()}
    for i, part in enumerate(learner.optimizer.state_dict()):
        for place, moments in part["state"].items():
            found |= {
                f"{i}.{place}.{name}": torch.as_tensor(m).numpy().tobytes() for name, m in moments.items()
            }
    return found


def poison_weight(learner: Learner, batches: list[Batch], value: float) -> list[Batch]:
    with torch.no_grad():
        learner.model.blocks[1].ffn.down.weight[3, 5] = value
    return batches


def poison_gradient(learner: Learner, batches: list[Batch], value: float) -> list[Batch]:
    """The loss is finite, and the gradient of one weight is not."""
    learner.model.blocks[0].ffn.down.weight.register_hook(lambda gradient: gradient * value)
    return batches


POISONS = {
    "weight": (poison_weight, "the weight blocks.1.ffn.down.weight is"),
    "gradient": (poison_gradient, "the gradient of blocks.0.ffn.down.weight is"),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_moves_a_weight_by_what_is_not_finite(decoder, loss, poison, value):
    """Weights, moments and the count of steps are those of before, and what is left learns on."""
    make, kind, brings = LOSSES[loss]
    spoil, told = POISONS[poison]
    learner = kind(decoder(vocab_size=VOCABULARY), SETTINGS, STEPS)
    batches, loss = brings(decoder), make()
    assert math.isfinite(learner.update(batches, loss)["loss"])
    spoiled = spoil(learner, batches, value)
    before = state(learner)
    with pytest.raises(LimbeckError, match=ONE_SENTENCE) as caught:
        learner.update(spoiled, loss)
    assert told in str(caught.value) and caught.value.exit_code == 2
    assert state(learner) == before and learner.step == 1
    assert all(p.grad is None for p in learner.model.parameters())


def test_every_loss_of_the_house_is_among_those_that_are_tried():
    """Every class of train/losses.py that can be called; and no other function has a gradient made and a step
    taken."""
    callable_classes = {
        node.name
        for module in (losses, dpo, reward_model)
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, ast.ClassDef) and any(getattr(m, "name", "") == "__call__" for m in node.body)
    }
    assert callable_classes == {name.partition("-")[0] for name in LOSSES}
    users = {p.name for p in Path(losses.__file__).parents[1].rglob("*.py") if ".backward()" in p.read_text()}
    assert users == {"learner.py", "selftest.py"}


GIVEN = {
    "PolicyGradient": ("advantages_M", "the advantages are not finite; a reward is infinite"),
    "PolicyGradient-r1": ("logprobs_M", "the sampler's log-probabilities are not finite"),
    "DPO": ("reference_M", "the reference's log-probabilities are not finite"),
    "SpanDistance": ("reference_M", "the reference's log-probabilities are not finite"),
}


@pytest.mark.parametrize("loss", GIVEN)
def test_what_a_batch_brings_is_blamed_before_the_loss_is(decoder, loss):
    make, kind, brings = LOSSES[loss]
    field, told = GIVEN[loss]
    learner = kind(decoder(vocab_size=VOCABULARY), SETTINGS, STEPS)
    batches = [replace(b, **{field: torch.full_like(getattr(b, field), math.nan)}) for b in brings(decoder)]
    before = state(learner)
    with pytest.raises(LimbeckError, match=told):
        learner.update(batches, make())
    assert state(learner) == before


@pytest.mark.parametrize("loss", [name for name in LOSSES if name.startswith("Distillation")])
def test_a_teacher_is_blamed_for_what_it_says(decoder, loss):
    make, kind, brings = LOSSES[loss]
    learner = kind(decoder(vocab_size=VOCABULARY), SETTINGS, STEPS)
    batches = brings(decoder)
    for batch in batches:
        next(t for t in vars(batch.teacher).values() if t.is_floating_point())[0] = math.nan
    with pytest.raises(LimbeckError, match="the teacher's logits are not finite; take a teacher"):
        learner.update(batches, make())


def test_a_loss_that_overflows_by_itself_is_blamed_itself(decoder):
    """The policy is far from what sampled, and its ratio is infinite."""
    learner = Learner(decoder(vocab_size=VOCABULARY), SETTINGS, STEPS)
    far = [replace(s, logprobs=s.logprobs - 500, advantage=-1.0) for s in samples()]
    with pytest.raises(
        LimbeckError, match="step 1 of 9: the loss is not finite; lower optimizer.learning_rate"
    ):
        learner.update(pack(far, 1 << 20), PolicyGradient(Policy()))


def test_a_gradient_too_large_to_be_measured_is_not_clipped_to_nothing(decoder):
    """Each number is finite, their sum of squares is not: torch would scale all by zero and go on."""
    learner = Learner(decoder(vocab_size=VOCABULARY), SETTINGS, STEPS)
    learner.model.blocks[0].ffn.down.weight.register_hook(lambda gradient: torch.full_like(gradient, 1e25))
    with pytest.raises(LimbeckError, match="the gradient of blocks.0.ffn.down.weight is not finite"):
        learner.update(pack(samples(), 1 << 20), CrossEntropy())


def test_a_rate_that_overflows_is_told_before_anything_is_saved(decoder, tmp_path):
    """The step itself makes a weight infinite: the file on disk is still the last good one, from which a
    lower rate goes on."""
    plan, made = [[0, 1], [1, 2], [0, 2]], samples()

    def learn(rate: float, steps: int) -> Learner:
        learner, checkpoint = (
            Learner(decoder(vocab_size=VOCABULARY), Optimizer(learning_rate=rate, weight_decay=10.0), 3),
            Checkpoint(tmp_path, 0.0),
        )
        if saved := checkpoint.restore():
            learner.load_state_dict(saved["learner"])
        SFTTrainer(learner, made, plan[:steps], 1 << 20, 1).train(
            RunLog(tmp_path, learner.step, 3), checkpoint
        )
        return learner

    learn(0.01, 1)
    good = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(
        LimbeckError, match=r"step 2 of 3: the new weight [\w.]+ is not finite; lower optimizer.learning_rate"
    ):
        learn(1e38, 3)
    assert (tmp_path / "state.pt").read_bytes() == good and len(read_metrics(tmp_path)) == 1
    assert learn(0.01, 3).step == 3 and all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf], ids=str)
def test_a_judge_that_rewards_without_bound_ends_the_stage(decoder, tokenizer, clock, tmp_path, wrong):
    """It is sound in the first step, whose checkpoint stays; nothing is recorded of the second."""
    policy = Policy(group_size=4, prompts_per_step=4, zero_variance="keep", mask_truncated=False)
    settings = RL(
        kind="rl",
        model="base",
        problems={"clock": 1},
        rewards={"language": 1.0},
        steps=3,
        policy=policy,
        sampling=Sampling(max_new_tokens=16),
    )

    class Judge(Mixture):
        """Loses its mind after the first step."""

        groups = 0

        def score(self, group):
            self.groups += 1
            scored = super().score(group)
            return (
                replace(scored, rewards=(wrong, *scored.rewards[1:]))
                if self.groups > policy.prompts_per_step
                else scored
            )

    learner = Learner(decoder(), settings.optimizer, 3)
    tasks = Judge({"clock": clock}, {"clock": 1}, settings.rewards)
    rewards = LearnedRewards(settings, {}, tasks, SamplingParams(max_new_tokens=16), "0/zero")
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(
            LimbeckError, match="optimiser step 2 of 3: the advantages are not finite; a reward is"
        ),
    ):
        train_grpo(tmp_path, learner, Engine(learner.model, tokenizer), rewards, Checkpoint(tmp_path, 0.0))
    assert len(read_metrics(tmp_path)) == 1 and Checkpoint(tmp_path).restore()["learner"]["step"] == 1


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize(
    "stage, setting",
    [
        ("base", "stages.base.optimizer.learning_rate=1e38"),
        ("dev1", "stages.dev1.optimizer.learning_rate=1e38"),
        ("zero", "stages.zero.optimizer.learning_rate=1e38"),
    ],
)
def test_a_stage_that_overflows_ends_in_one_sentence_and_leaves_no_artifact(
    finished, tmp_path, stage, setting
):
    """Named are stage, step, tensor and remedy; with a lower rate the same run goes on."""
    shutil.copytree(finished.home, tmp_path / "runs")
    extra = () if stage == "base" else ("--set", f"stages.{stage}.optimizer.weight_decay=10")
    code, _, err = tiny.answer("run", finished.recipe, "--runs", tmp_path / "runs", "--set", setting, *extra)
    assert code == 2, err
    (said,) = [line for line in err.splitlines() if line.startswith("limbeck: ")]
    assert (
        f"limbeck: stage {stage}: optimiser step " in said
        and "is not finite; lower optimizer.learning_rate" in said
    )
    assert tiny.digests(tmp_path / "runs") == tiny.digests(finished.home)
    code, _, err = tiny.answer("run", finished.recipe, "--runs", tmp_path / "runs")
    assert code == 0, err


def test_a_model_with_a_spoiled_weight_is_not_loaded(finished, tmp_path):
    shutil.copytree(finished.recipe.parent / "model", tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text(finished.recipe.read_text())
    held = load_file(tmp_path / "model/model.safetensors")
    held["model.norm.weight"][0] = math.nan
    save_file(held, tmp_path / "model/model.safetensors", {"format": "pt"})
    run = tiny.open_run(tmp_path / "tiny.yaml", tmp_path / "runs")
    event = run_job(run._job(run.graph.nodes["brought"]))
    assert str(_failure({**event, "name": "brought"}, tmp_path)) == (
        f"stage brought: {tmp_path / 'model'}: the weight norm.weight is not finite; "
        "copy the model again from its source"
    )


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("width", [1, 3, 7])
def test_heads_that_cannot_be_rotated_are_refused(width, tmp_path):
    """Rotary positions take dimensions in pairs; one that was left over was never written."""
    with pytest.raises(LimbeckError, match=f"head_dim = {width} is odd, but rotary positions"):
        ModelConfig("llama", 40, 24, 2, 4, 2, width, 48)
    with pytest.raises(LimbeckError, match=f"qk_rope_head_dim = {width} is odd"):
        ModelConfig("deepseek_v3", 40, 24, 2, 4, 4, width, 48, latent=Latent(8, 4, width, 4))
    even = ModelConfig("llama", 40, 24, 2, 4, 2, 6, 48)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**even.to_hf(0, 1), "head_dim": width}))
    with pytest.raises(LimbeckError, match=f"^{path}: head_dim = {width} is odd, but .* give an even size$"):
        ModelConfig.from_directory(tmp_path)
    path.write_text(json.dumps({**even.to_hf(0, 1), "head_dim": None, "hidden_size": 4 * width}))
    with pytest.raises(LimbeckError, match=f"^{path}: head_dim = {width} is odd"):
        ModelConfig.from_directory(tmp_path)


def test_a_file_whose_heads_are_rotated_in_part_is_refused():
    tree = ModelConfig("llama", 40, 24, 2, 4, 2, 6, 48).to_hf(0, 1)
    for given in (
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ):
        with pytest.raises(
            LimbeckError, match="^config.json: partial_rotary_factor = 0.5 is not supported; only 1 is"
        ):
            ModelConfig.from_hf({**tree, **given})
    with pytest.raises(LimbeckError, match="num_key_value_heads = 3 does not divide num_attention_heads = 4"):
        ModelConfig.from_hf({**tree, "num_key_value_heads": 3})


@pytest.mark.parametrize(
    "shape, told",
    [
        (
            "hidden_size: 28, heads: 4, kv_heads: 4",
            "hidden_size = 28 is no even number of dimensions for each of heads = 4, .* a multiple of 8",
        ),
        (
            "hidden_size: 8, heads: 8, kv_heads: 4",
            "hidden_size = 8 is no even number of dimensions for each of heads = 8, .* a multiple of 16",
        ),
        ("hidden_size: 64, heads: 4, kv_heads: 3", "kv_heads = 3 does not divide heads = 4"),
        (
            "latent: {kv_lora_rank: 8, nope_dim: 4, rope_dim: 3, value_dim: 4}",
            "latent.rope_dim: input should be a multiple of 2",
        ),
    ],
)
def test_a_shape_whose_heads_cannot_be_rotated_is_a_mistake_in_the_recipe(finished, tmp_path, shape, told):
    recipe = tmp_path / "odd.yaml"
    recipe.write_text(finished.recipe.read_text())
    with pytest.raises(LimbeckError, match=f"^{recipe}: stages.base.shape.*{told}"):
        load(recipe, [f"stages.base.shape={{{shape}}}"])
    code, out, err = tiny.answer(
        "run", recipe, "--runs", tmp_path / "runs", "--set", f"stages.base.shape={{{shape}}}"
    )
    assert (
        code == 2
        and not out
        and err.startswith(f"limbeck: {recipe}: stages.base.shape")
        and not (tmp_path / "runs").exists()
    )


def test_latent_heads_may_be_odd_where_nothing_is_rotated(monkeypatch):
    """Keys of 2 + 5 and values of 7, or of 3: as plain torch computes them, forward and back."""
    for value in (7, 3):
        config = ModelConfig(
            "deepseek_v3", 40, 28, 2, 4, 4, 2, 48, latent=Latent(9, 5, 2, value), max_positions=32
        )
        model = Decoder(config).initialize(0)
        tokens = torch.arange(20)

        def learn(model: Decoder = model, tokens: torch.Tensor = tokens) -> list[torch.Tensor]:
            hidden = model(tokens, Packed([12, 8]))
            (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
            found = [hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
            model.zero_grad(set_to_none=True)
            return found

        ours = learn()
        with monkeypatch.context() as plain:
            plain.setattr(kernels, "serves", lambda *_: False)
            theirs = learn()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
