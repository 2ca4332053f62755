"""The toy that learns: what every other test cannot see, that the parts together make a model better."""

from __future__ import annotations

import pytest
import torch
from trainers import train_grpo

from limbeck.config.recipe import RL, Miniature, Optimizer, Policy, Sampling
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.run_log import RunLog, read_metrics
from limbeck.tasks.clock_countdown import Countdown, encode_documents
from limbeck.tasks.mixture import Mixture
from limbeck.train.checkpoint import Checkpoint
from limbeck.train.learned_rewards import LearnedRewards
from limbeck.train.learner import Learner
from limbeck.train.sft import SFTTrainer, batches
from limbeck.train.training_log import summarize

pytestmark = pytest.mark.slow

STEPS = 24


@pytest.fixture(scope="module")
def task() -> Countdown:
    """A clock of three hours and two numbers: little to know, and little to find."""
    return Countdown("clock", Miniature(source="miniature", numbers=2, modulus=3, largest=4, held_out=0.3))


def held_out(decoder: Decoder, task: Countdown) -> dict[str, float]:
    """Temperature 1 on problems that were never trained on, ten samples each."""
    engine, tasks = Engine(decoder, task.tokenizer()), Mixture({"clock": task}, {"clock": 1}, {"accuracy": 1})
    groups = engine.rollout(task.problems("test"), 10, SamplingParams(max_new_tokens=60), "held out")
    return summarize([tasks.score(group) for group in groups])


def test_a_base_learns_from_text_and_then_from_rewards_alone(task, tmp_path):
    """Pretraining halves the loss; RL, paid for right answers and tags, raises held-out accuracy and the
    number of attempts, without a demonstration."""
    tokenizer = task.tokenizer()
    decoder = Decoder(ModelConfig("llama", tokenizer.size, 48, 2, 4, 4, 12, 96, rope_theta=100.0)).initialize(
        1
    )
    documents = encode_documents(task.documents("test", {}), tokenizer, 600_000)
    plan = batches(documents, 1024, "test")
    settings = Optimizer(name="muon", learning_rate=1e-2, warmup_steps=20, schedule="linear", final_ratio=0)
    (tmp_path / "base").mkdir()
    trainer = SFTTrainer(Learner(decoder, settings, len(plan)), documents, plan, 1 << 20, log_every=1)
    trainer.train(RunLog(tmp_path / "base"), Checkpoint(tmp_path / "base"))
    losses = [row["loss"] for row in read_metrics(tmp_path / "base")]
    assert sum(losses[-10:]) < sum(losses[:10]) / 2

    before = held_out(decoder, task)
    stage = RL(
        kind="rl",
        model="base",
        problems={"clock": 1},
        steps=STEPS,
        sampling=Sampling(max_new_tokens=60),
        policy=Policy(
            prompts_per_step=16,
            updates_per_rollout=2,
            advantage_scale="group",
            zero_variance="drop",
            mask_truncated=False,
        ),
    )
    tasks = Mixture({"clock": task}, stage.problems, stage.rewards)
    engine, learner = Engine(decoder, tokenizer), Learner(decoder, stage.optimizer, 2 * STEPS)
    (tmp_path / "zero").mkdir()
    rewards = LearnedRewards(stage, {}, tasks, SamplingParams(max_new_tokens=60), "test")
    train_grpo(tmp_path / "zero", learner, engine, rewards)
    after = held_out(decoder, task)
    assert after["accuracy"] > before["accuracy"] + 0.1
    assert after["attempts"] > 1.5 * before["attempts"]
    assert not torch.isnan(next(decoder.parameters())).any()
