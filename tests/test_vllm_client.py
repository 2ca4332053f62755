"""A vLLM server in place of our engine, played by a stub: what is learned, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from trainers import train_grpo
from vllm_stub import VLLMStub, uniforms

from limbeck.config.load import load
from limbeck.config.parts import Optimizer, Policy, Sampling
from limbeck.config.recipe import RL
from limbeck.engine import rollout
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.engine.vllm_client import VLLMEngine
from limbeck.run_log import read_metrics
from limbeck.tasks.mixture import Mixture
from limbeck.train.batch import pack
from limbeck.train.learned_rewards import LearnedRewards
from limbeck.train.learner import Learner
from limbeck.train.losses import TRUNCATION, correct
from limbeck.types import LimbeckError, Sample, fingerprint

pytestmark = pytest.mark.slow

SAMPLING = Sampling(max_new_tokens=12)
SEED = "0/zero"


def settings(engine=None, rate=3e-3, steps=3, updates=2) -> RL:
    return RL(
        kind="rl",
        model="base",
        problems={"clock": 1},
        rewards={"accuracy": 1, "format": 0.2, "language": 0.5},
        steps=steps,
        policy=Policy(prompts_per_step=4, group_size=4, updates_per_rollout=updates, mask_truncated=False),
        sampling=SAMPLING,
        optimizer=Optimizer(learning_rate=rate),
        engine=engine,
    )


def learn(folder, clock, model, engine, stage) -> list[dict]:
    """GRPO of a decoder with an engine; the metrics of its steps."""
    folder.mkdir()
    tasks = Mixture({"clock": clock}, {"clock": 1}, dict(stage.rewards))
    rewards = LearnedRewards(stage, {}, tasks, SamplingParams(max_new_tokens=12), SEED)
    learner = Learner(model, stage.optimizer, 2 * stage.steps, samples=not stage.engine)
    train_grpo(folder, learner, engine, rewards)
    return read_metrics(folder)


def test_a_run_learns_the_same_from_a_server_as_from_our_engine(
    clock, tokenizer, decoder, tmp_path, monkeypatch
):
    """With the server's random numbers in our engine: the same responses, and the same weights but for
    rounding. Prompts are sent as ids, and weights are handed over before each rollout, and deleted."""

    def as_the_server(problem, count, sampling, seed):
        return uniforms(count, sampling.max_new_tokens, fingerprint(seed, problem.id) >> 1)

    monkeypatch.setattr(rollout, "_uniforms", as_the_server)
    ours = decoder()
    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    wanted = learn(tmp_path / "ours", clock, ours, Engine(ours, tokenizer), settings())
    theirs = decoder()
    with VLLMStub() as stub:
        engine = VLLMEngine("stages.zero.engine", stub.url, theirs, tokenizer)
        found = learn(tmp_path / "theirs", clock, theirs, engine, settings(stub.url))
    assert [step["reward"] for step in found] == [step["reward"] for step in wanted]
    for name, weight in ours.state_dict().items():
        moved = (weight - before[name]).norm()
        assert (weight - theirs.state_dict()[name]).norm() <= 1e-3 * moved, name
    assert not torch.equal(before["head.weight"], ours.head.weight)
    assert all(step["gap"] < 1e-4 and step["gap_kl"] < 1e-6 for step in found)
    assert all(step["truncated_weights"] == 0 for step in found)
    assert stub.calls.count("/collective_rpc") == 3 == stub.calls.count("/reset_prefix_cache")
    assert len(set(stub.folders)) == 3 and not any(folder.exists() for folder in stub.folders)
    assert all(isinstance(token, int) for prompt in stub.prompts for token in prompt)


def test_the_clipped_ratio_is_the_learner_s_alone(clock, tokenizer, decoder, tmp_path):
    """A server that rounds otherwise: its log-probabilities enter the weights of tokens, and nothing is
    clipped for them."""
    model = decoder()
    with VLLMStub(noise=0.05) as stub:
        engine = VLLMEngine("stages.zero.engine", stub.url, model, tokenizer)
        steps = learn(tmp_path / "run", clock, model, engine, settings(stub.url, updates=1))
    for step in steps:
        assert step["gap"] == pytest.approx(0.05, abs=1e-4)
        assert step["gap_kl"] == pytest.approx(0.05**2 / 2, rel=0.1)
        assert step["kl_old"] < 1e-9 and step["clipped"] == 0 == step["truncated_weights"]


def test_a_server_that_keeps_old_weights_is_noticed(clock, tokenizer, decoder, tmp_path):
    model = decoder()
    with VLLMStub(deaf=True) as stub:
        engine = VLLMEngine("stages.zero.engine", stub.url, model, tokenizer)
        with pytest.raises(LimbeckError, match="a KL of .* other weights .* must load the new"):
            learn(tmp_path / "run", clock, model, engine, settings(stub.url, rate=0.03, steps=6))


def test_a_server_without_ids_or_without_reloading_is_refused(
    clock, tokenizer, decoder, tmp_path, monkeypatch
):
    problems = clock.problems("train")[:2]
    with VLLMStub(ids=False) as stub:
        engine = VLLMEngine("stages.zero.engine", stub.url, decoder(), tokenizer)
        with pytest.raises(
            LimbeckError, match="stages.zero.engine: .* does not return all token ids"
        ) as error:
            engine.rollout(problems, 2, SamplingParams(max_new_tokens=4), 0)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    with VLLMStub() as stub:
        engine = VLLMEngine("stages.zero.engine", stub.url, decoder(), tokenizer)
        for status, code in ((404, 2), (400, 2), (503, 75)):
            monkeypatch.setattr(stub, "post", lambda path, body: (status, {"detail": "why"}))  # noqa: B023
            with pytest.raises(
                LimbeckError, match=rf"collective_rpc .*{status}.*why.*sample-with-vllm"
            ) as error:
                engine.rollout(problems, 2, SamplingParams(max_new_tokens=4), 0)
            assert error.value.exit_code == code


def test_a_weight_is_the_ratio_of_both_probabilities_and_never_more_than_the_truncation():
    sampler = np.log(np.array([0.5, 0.2, 0.1], np.float32))
    sample = Sample(np.arange(4), start=1, advantage=-2.0, logprobs=sampler)
    old_M = torch.tensor([0.25, 0.2, 0.9]).log()
    (batch,), metrics = correct(pack([sample], 64), [old_M])
    assert batch.advantages_M.tolist() == pytest.approx([-1.0, -2.0, -2.0 * TRUNCATION])
    assert torch.equal(batch.logprobs_M, old_M)
    ratio = np.array([0.5, 1, 9])
    assert metrics["gap"] == pytest.approx(np.log(9))
    assert metrics["gap_kl"] == pytest.approx((ratio - np.log(ratio) - 1).mean(), rel=1e-5)
    assert metrics["truncated_weights"] == pytest.approx(1 / 3)


RECIPE = tiny.RECIPE.partition("  screened:")[0].replace("  brought: {kind: load, path: model}\n", "")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("exact=true", "exact"),
        ("policy.keep_sampling_mask=true", "policy.keep_sampling_mask"),
        ("sampling.top_p=0.9", "sampling.top_p"),
        ("sampling.temperature=0", "sampling.temperature"),
    ],
)
def test_what_a_server_cannot_give_is_refused_before_anything_runs(tmp_path, change, key):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    server = "stages.zero.engine=http://127.0.0.1:9/v1"
    with pytest.raises(LimbeckError, match=rf"stages\.zero\.{key} is not for an engine elsewhere"):
        load(tmp_path / "tiny.yaml", [server, f"stages.zero.{change}"])


def test_a_dead_server_ends_the_stage_resumably_and_another_one_goes_on(tmp_path):
    """Exit code 75 and one sentence; the same command, with a server elsewhere, goes on from the checkpoint
    with the weights handed over first, and ends with the weights of an undisturbed run. The manifest says
    that nothing is exact, the key that another engine sampled, and not where."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)

    def run(home, url):
        server = f"stages.zero.engine={url}"
        code, out, err = tiny.answer("run", recipe, "--runs", tmp_path / home, "--set", server)
        return code, " ".join((out + err).split())

    with VLLMStub() as stub:
        code, said = run("whole", stub.url)
    assert code == 0 and "stages.zero.engine: vLLM samples" in said and "nothing is exact" in said
    shutil.copytree(tmp_path / "whole", tmp_path / "halves", ignore=shutil.ignore_patterns("rl-*"))
    with VLLMStub(answers=22) as stub:
        code, said = run("halves", stub.url)
    assert code == 75 and "stages.zero.engine: http" in said and "Traceback" not in said
    assert "goes on from the last checkpoint" in said
    with VLLMStub() as other:
        code, said = run("halves", other.url)
    assert code == 0 and len(other.prompts) < 8 * 4
    assert other.calls.index("/collective_rpc") < other.calls.index("/v1/completions")
    folders = [next((tmp_path / home / "store").glob("rl-*")) for home in ("whole", "halves")]
    whole, halves = (json.loads((folder / "manifest.json").read_text()) for folder in folders)
    assert whole["notes"] == halves["notes"] and whole["notes"]["exact"] is False
    assert whole["notes"]["engine"] == "vllm"
    assert whole["identity"]["settings"]["engine"] == "vllm" and whole["key"] == halves["key"]
    first, second = ((folder / "model" / "model.safetensors").read_bytes() for folder in folders)
    assert first == second
