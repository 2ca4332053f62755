"""Trainers over a folder, as the stages make them: from the last checkpoint to the end."""

from __future__ import annotations

import math
from pathlib import Path

from limbeck.run_log import RunLog
from limbeck.train.checkpoint import Checkpoint
from limbeck.train.grpo import GRPOTrainer
from limbeck.train.learned_rewards import LearnedRewards
from limbeck.train.learner import Learner
from limbeck.train.training_log import TrainingLog


def train_grpo(
    folder: Path,
    learner: Learner,
    engine,
    rewards: LearnedRewards,
    checkpoint: Checkpoint | None = None,
    budget: float = math.inf,
    reference=None,
) -> None:
    """GRPO with the settings of `rewards` and its seed."""
    checkpoint = checkpoint or Checkpoint(folder)
    state = checkpoint.restore()
    log = TrainingLog(RunLog(folder, state["step"] if state else 0), rewards.settings, budget)
    trainer = GRPOTrainer(
        learner, engine, rewards, rewards.settings, rewards.seed, log, checkpoint, reference
    )
    if state:
        trainer.load_state_dict(state)
    trainer.train()
