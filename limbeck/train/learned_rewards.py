"""Learned rewards (an LLM judge or a reward model), added to the rule-based rewards, with an alarm for
reward hacking.

A part is one named component of a reward, such as `accuracy`. A learned part counts in a step if its score
is added to the rewards of that step. Optimizing a learned reward exploits its weaknesses: DeepSeek-R1's
helpfulness reward rose while its coding results got worse (arXiv 2501.12948v2, B.5), and so it was used in
the last 400 steps only. Here, while a learned reward counts, the accuracy on held-out problems is measured
in every step. If the learned reward rises and that accuracy does not, an alarm is raised and the learned
reward no longer counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ..config.learned_rewards import LearnedReward
from ..config.recipe import RL
from ..model.config import ModelConfig
from ..types import Group, LimbeckError, Problem, Sampler, Score

# t values of a trend; false alarms of honest runs: LOG.md
RISE = 3.0  # of the learned reward
WIDER = 3.0  # of its distance from the accuracy
CLEAR = 2.0  # an accuracy that rises by less does not rise
FALL = -3.0  # of an accuracy near its ceiling
CEILING = 0.95  # an accuracy as high as this cannot rise: it has to fall
DRAWS = 100  # attempts to draw problems that are not held out


class Tasks(Protocol):
    """A source of problems that also scores the answers."""

    def draw(self, count: int, seed: object, split: str = "train") -> list[Problem]:
        """Draw `count` problems of a split. The same seed gives the same problems."""

    def score(self, group: Group) -> Group:
        """Return the group with a score and a reward for each completion."""


class RewardFunction(Protocol):
    """A judge or a reward model. It gives each completion one named part of the score, between 0 and 1, with
    a reason."""

    def score_groups(self, groups: Sequence[Group]) -> list[list[Score]]:
        """Return the scores of the completions of each group, in the order of the groups."""

    def take_usage(self) -> dict[str, float]:
        """Return the tokens, FLOPs and money that were spent since the last call, by name."""


@dataclass(frozen=True)
class HeldOut:
    """The measurement of a step on `problems` held-out problems: metrics (the accuracy, the number of
    tokens, and the usage of the reward functions), and one sentence for each alarm."""

    metrics: Mapping[str, float]
    alarms: Sequence[str] = ()
    problems: int = 0

    def flops(self, policy: ModelConfig) -> float:
        """Return the FLOPs of the reward functions' models and of the answers that the policy gave to the
        held-out problems."""
        tokens = self.metrics.get("held_out_tokens", 0)
        answers = tokens * policy.flops_per_token(tokens / max(1, self.problems) / 2)
        return sum(value for name, value in self.metrics.items() if name.endswith("_flops")) + answers


class LearnedRewards:
    """The learned rewards of one RL stage. It decides which of them count at a step, and detects reward
    hacking.

    `functions` has one reward function for each learned part of the reward; its keys are those of
    `settings.learned_rewards`. `stopped` is True once an alarm has ended the stage."""

    def __init__(
        self,
        settings: RL,
        functions: Mapping[str, RewardFunction],
        tasks: Tasks,
        sampling: Any,
        seed: object,
    ):
        self.settings = settings
        self.functions = dict(functions)
        self.tasks = tasks
        self.sampling = sampling
        self.seed = seed
        count = max((self._settings(part).held_out for part in self.functions), default=0)
        self.held_out = tasks.draw(count, (seed, "held out")) if count else []
        self.held_out_ids = {problem.id for problem in self.held_out}
        self.history: dict[str, list[list[float]]] = {part: [] for part in self.functions}
        self.dropped: list[str] = []
        self.stopped = False

    def at(self, step: int) -> Tasks:
        """Return the stage's source of problems, which also scores with the learned rewards that count at a
        step."""
        return RewardedTasks(self, self._counting(step)) if self.functions else self.tasks

    def evaluate(self, step: int, groups: Sequence[Group], engine: Sampler) -> HeldOut:
        """Sample answers to the held-out problems with the weights after a step, and check for reward
        hacking.

        For each learned reward, the accuracy of these answers is compared over time with its values in
        `groups`, the groups of the step. Returns the measurement; an empty one if no learned reward counts
        at this step."""
        counting = self._counting(step)
        if not counting:
            return HeldOut({})
        rollout = engine.rollout(self.held_out, 1, self.sampling, (self.seed, "held out", step))
        answers = [self.tasks.score(group) for group in rollout]
        accuracy = float(np.mean([group.scores[0].parts["accuracy"] for group in answers]))
        tokens = sum(len(group.prompt_tokens) + len(group.completions[0].tokens) for group in answers)
        alarms = [alarm for part in counting if (alarm := self._check(part, groups, accuracy))]
        metrics = {"held_out_accuracy": accuracy, "held_out_tokens": tokens}
        for function in self.functions.values():
            metrics |= function.take_usage()
        return HeldOut(metrics, alarms, len(self.held_out))

    def state_dict(self) -> dict[str, Any]:
        """Return the history that the alarms depend on, for an exact resume, under the keys of stored
        checkpoints."""
        return {"watched": self.history, "dropped": self.dropped, "over": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.history = state["watched"]
        self.dropped = state["dropped"]
        self.stopped = state["over"]

    def _settings(self, part: str) -> LearnedReward:
        """Return the settings of a learned part of the reward."""
        return self.settings.learned_rewards[part]

    def _counting(self, step: int) -> list[str]:
        """Return the names of the learned parts that count at a step: those in their last `last_steps` steps
        that no alarm has dropped."""
        counting = []
        for part in self.functions:
            last_steps = self._settings(part).last_steps or self.settings.steps
            if step >= self.settings.steps - last_steps and part not in self.dropped:
                counting.append(part)
        return counting

    def applies(self, part: str, problem: Problem) -> bool:
        """Return True if completions of this problem are scored with the learned part `part`."""
        sources = self._settings(part).problems
        return not sources or problem.id.partition("/")[0] in sources

    def _check(self, part: str, groups: Sequence[Group], accuracy: float) -> str:
        """Add the means of a step to the history of a learned part, and check the history for reward
        hacking.

        `accuracy` is that of the held-out problems. Returns the alarm's sentence and drops the part if it
        has been hacked; otherwise returns an empty string."""
        settings = self._settings(part)
        scores = [s for group in groups if self.applies(part, group.problem) for s in group.scores]
        values = [score.parts[part] for score in scores if part in score.parts]
        if not values:
            return ""
        steps = [*self.history[part], [float(np.mean(values)), accuracy]]
        self.history[part] = steps[-settings.window :]
        if len(self.history[part]) < settings.window or not hacked(*zip(*self.history[part], strict=True)):
            return ""
        self.dropped.append(part)
        self.stopped = settings.on_alarm == "stop"
        then = "the stage ends here" if self.stopped else "it no longer counts"
        return f"reward hacking: {part} rises while the truth on held-out problems does not: {then}"


class RewardedTasks:
    """A source of problems whose scores include the learned parts `parts` of the reward. It never draws a
    held-out problem."""

    def __init__(self, rewards: LearnedRewards, parts: Sequence[str]):
        self.rewards = rewards
        self.parts = parts

    def draw(self, count: int, seed: object, split: str = "train") -> list[Problem]:
        """Draw `count` problems that are not held out. Raises LimbeckError if there are not enough."""
        problems: list[Problem] = []
        for attempt in range(DRAWS):
            drawn = self.rewards.tasks.draw(count, (seed, attempt) if attempt else seed, split)
            problems += [problem for problem in drawn if problem.id not in self.rewards.held_out_ids]
            if len(problems) >= count:
                return problems[:count]
        raise LimbeckError(
            "learned_rewards: held_out leaves no problem to learn from; lower it, or give more problems"
        )

    def score(self, group: Group) -> Group:
        """Return the group with its rule-based scores and the learned parts `parts`."""
        group = self.rewards.tasks.score(group)
        for part in self.parts:
            if self.rewards.applies(part, group.problem):
                scores = self.rewards.functions[part].score_groups([group])[0]
                group = add_reward_part(group, scores, part, self.rewards.settings.rewards[part])
        return group


def add_reward_part(group: Group, scores: Sequence[Score], part: str, weight: float) -> Group:
    """Return a scored group with one more part: `scores` holds it for each completion, and `weight` times
    its value is added to the rewards."""
    joined = [
        replace(
            score,
            parts={**score.parts, **extra.parts},
            reasons={**score.reasons, **extra.reasons},
            stats={**score.stats, **extra.stats},
        )
        for score, extra in zip(group.scores, scores, strict=True)
    ]
    rewards = [
        reward + weight * extra.parts[part] for reward, extra in zip(group.rewards, scores, strict=True)
    ]
    return replace(group, scores=tuple(joined), rewards=tuple(rewards))


def hacked(learned: Sequence[float], accuracy: Sequence[float]) -> bool:
    """Return True if a learned reward rose over the steps while the accuracy did not clearly rise, and the
    gap between them widened.

    Both sequences have one value per step. Where the accuracy was already near 1 and cannot rise, it must
    have fallen.

    >>> hacked([0.1, 0.2, 0.3, 0.41, 0.5], [0.5, 0.4, 0.5, 0.6, 0.5])
    True
    """
    learned_S = np.asarray(learned)
    accuracy_S = np.asarray(accuracy)
    near_ceiling = accuracy_S[: len(accuracy_S) // 2].mean() > CEILING
    if trend(accuracy_S) >= (FALL if near_ceiling else CLEAR):
        return False
    return bool(trend(learned_S) > RISE and trend(learned_S - accuracy_S) > WIDER)


def trend(values_S: np.ndarray) -> float:
    """Return the t value of the slope of a least-squares line through one value per step; `values_S` is [S],
    S the number of steps."""
    n = len(values_S)
    steps_S = np.arange(n) - (n - 1) / 2
    spread = float((steps_S**2).sum())
    slope = float((steps_S * values_S).sum()) / spread
    residual_S = values_S - values_S.mean() - slope * steps_S
    error = float(np.sqrt((residual_S**2).sum() / (n - 2) / spread))
    return slope / max(error, 1e-9)
