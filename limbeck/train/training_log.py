"""Metrics, FLOPs and alarms of the steps of a stage that samples and learns (RL, on-policy distillation)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config.methods import Distill
from ..config.recipe import RL
from ..model.config import ModelConfig
from ..run_log import RunLog
from ..types import Group, Sample


class TrainingLog:
    """Writes each step to the stage's run log, and counts FLOPs against `budget`.

    `flops` is the sum over all steps. A few rollouts are written every `log_every` steps and after the last.
    """

    def __init__(self, run_log: RunLog, settings: RL | Distill, budget: float = math.inf):
        self.run_log = run_log
        self.settings = settings
        self.budget = budget
        self.flops = 0.0

    @property
    def over_budget(self) -> bool:
        """True once the budget is spent; the step that exceeds it is the last."""
        return self.flops >= self.budget

    def step(
        self, step: int, metrics: Mapping[str, Any], groups: Sequence[Group], learned: Sequence[Group]
    ) -> None:
        """Write one step: metrics (with its `flops`), one of the sampled groups now and then, and the ids of
        the problems of the groups that were learned from."""
        self.flops += metrics["flops"]
        shown = step % self.settings.log_every == 0 or step == self.settings.steps - 1
        problems = [group.problem.id for group in learned]
        self.run_log.step(step, dict(metrics), list(groups[:1]) if shown else [], problems)

    def sync(self) -> None:
        """Force the run log to disk."""
        self.run_log.sync()


def summarize(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all completions: reward, length, truncation, and the parts and statistics of their
    scores."""
    completions = [completion for group in groups for completion in group.completions]
    scores = [score for group in groups for score in group.scores]
    means = {
        "reward": float(np.mean([reward for group in groups for reward in group.rewards])),
        "length": float(np.mean([len(completion.tokens) for completion in completions])),
        "truncated": float(np.mean([not completion.stopped for completion in completions])),
    }
    means |= _means([score.parts for score in scores])
    return means | _means([score.stats for score in scores])


def _means(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name over the tables that have it, in the order of the names."""
    names = sorted({name for table in tables for name in table})
    means = {}
    for name in names:
        values = [table[name] for table in tables if name in table]
        means[name] = float(np.mean(values))
    return means


def sampled_tokens(groups: Sequence[Group]) -> int:
    """Tokens of a rollout: each prompt once, and all completions."""
    prompts = sum(len(group.prompt_tokens) for group in groups)
    return prompts + sum(len(completion.tokens) for group in groups for completion in group.completions)


def count_flops(config: ModelConfig, sampled: int, learned: int, context: float) -> float:
    """FLOPs of sampling and of learning so many tokens, each attending to `context` tokens on average."""
    sampling = sampled * config.flops_per_token(context)
    return sampling + learned * config.flops_per_token(context, backward=True)


def volume(groups: Sequence[Group], samples: Sequence[Sample], config: ModelConfig) -> dict[str, float]:
    """Tokens sampled and learned from in a step, and the FLOPs of both; a token attends to half of its
    sequence on average."""
    sampled = sampled_tokens(groups)
    learned = sum(len(sample.tokens) for sample in samples)
    contexts = [
        len(group.prompt_tokens) + len(completion.tokens) / 2
        for group in groups
        for completion in group.completions
    ]
    flops = count_flops(config, sampled, learned, float(np.mean(contexts)))
    return {"sampled_tokens": sampled, "learned_tokens": learned, "flops": flops}


def merge(updates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the updates of a step. `gap` is the first update's largest log-ratio: it runs on the very
    weights that sampled, so this is the difference of sampler and learner, zero but for rounding."""
    if not updates:
        return {}
    means = {name: np.mean([update[name] for update in updates], axis=0).tolist() for name in updates[0]}
    return {**means, "gap": updates[0]["max_drift"]}
