"""The log of a stage that samples and learns (RL, on-policy distillation): metrics, FLOPs and alarms of its
steps."""

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
    """Writes each step to the run log of a stage, and counts its FLOPs against `budget`, which is in FLOPs
    too.

    `flops` is the sum over all steps so far. A few groups of completions are written every `log_every` steps
    and after the last step."""

    def __init__(self, run_log: RunLog, settings: RL | Distill, budget: float = math.inf):
        self.run_log = run_log
        self.settings = settings
        self.budget = budget
        self.flops = 0.0

    @property
    def over_budget(self) -> bool:
        """True once the FLOPs spent reach the budget. The step that exceeds the budget is completed and is
        the last."""
        return self.flops >= self.budget

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any],
        groups: Sequence[Group],
        learned: Sequence[Group],
        weights: str = "",
    ) -> None:
        """Write one step: its metrics, which include its `flops`; at some steps one of the sampled `groups`;
        and the ids of the problems of the groups `learned`, from which the step learned. `weights` is the
        checksum of the weights that sampled."""
        self.flops += metrics["flops"]
        shown = step % self.settings.log_every == 0 or step == self.settings.steps - 1
        problems = [group.problem.id for group in learned]
        self.run_log.step(step, dict(metrics), list(groups[:1]) if shown else [], problems, 0, weights)

    def sync(self) -> None:
        """Force the run log to disk."""
        self.run_log.sync()


def summarize(groups: Sequence[Group]) -> dict[str, float]:
    """Return means over all completions of the groups: reward, length in tokens, share of truncated
    completions, and each part and statistic of their scores, by name."""
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
    """Return the mean of each name over the dictionaries that have it, sorted by name."""
    names = sorted({name for table in tables for name in table})
    means = {}
    for name in names:
        values = [table[name] for table in tables if name in table]
        means[name] = float(np.mean(values))
    return means


def sampled_tokens(groups: Sequence[Group]) -> int:
    """Return the number of tokens of a rollout: each prompt counts once, and all completions count."""
    prompts = sum(len(group.prompt_tokens) for group in groups)
    return prompts + sum(len(completion.tokens) for group in groups for completion in group.completions)


def count_flops(config: ModelConfig, sampled: int, learned: int, context: float) -> float:
    """Return the FLOPs of sampling `sampled` tokens and learning from `learned` tokens, where each token
    attends to `context` tokens on average."""
    sampling = sampled * config.flops_per_token(context)
    return sampling + learned * config.flops_per_token(context, backward=True)


def volume(groups: Sequence[Group], samples: Sequence[Sample], config: ModelConfig) -> dict[str, float]:
    """Return the number of tokens sampled and learned from in a step, and the FLOPs of both. A token is
    taken to attend to its prompt and half of its completion."""
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
    """Return the mean of each metric over the updates of a step; an empty dictionary without updates.

    `gap` is added: the largest absolute log-ratio of the first update. That update uses the same weights
    that sampled, so its log-ratios are the difference between sampler and learner, which should be zero but
    for rounding."""
    if not updates:
        return {}
    means = {name: np.mean([update[name] for update in updates], axis=0).tolist() for name in updates[0]}
    means.setdefault("gap", updates[0]["max_drift"])  # a corrected update has its own
    return means
