"""Learned rewards (LLM judge, reward model) beside the rule-based ones, with an alarm for reward hacking.

Rewarding an opinion finds its weaknesses: DeepSeek-R1's helpfulness reward rose while its programs got worse (arXiv
2501.12948v2, B.5), so it counted in the last 400 steps only. While an opinion counts, problems that are kept out of
learning tell the truth; where it rises and the truth does not, an alarm is raised, and it no longer counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ..config.learned_rewards import Opinion
from ..config.recipe import RL
from ..types import Group, LimbeckError, Problem, Sampler, Score

RISE, WIDER, CLEAR, FALL = 3.0, 3.0, 2.0, -3.0  # t values of a trend; false alarms of honest runs: LOG.md
CEILING = 0.95  # a truth as high as this cannot rise: it has to fall
PATIENCE = 100


class Tasks(Protocol):
    """What a loop needs to know of problems: how to draw and how to score them."""

    def draw(self, count: int, seed: object, split: str = "train") -> list[Problem]: ...

    def score(self, group: Group) -> Group: ...


class Voice(Protocol):
    """Whoever has an opinion of completions: one named part for each, between 0 and 1, with its reason."""

    def opinions(self, groups: Sequence[Group]) -> list[list[Score]]: ...

    def bill(self) -> dict[str, float]: ...


class Panel:
    """The opinions of one RL stage: which count at a step, what they add, and whether they still deserve it.

    `voices` and `settings.learned_rewards` have the same names: the parts of the reward. `over` says that an alarm has
    ended the stage.
    """

    def __init__(self, settings: RL, voices: Mapping[str, Voice], tasks: Tasks, sampling: Any, seed: object):
        self.settings, self.voices, self.tasks, self.sampling, self.seed = (
            settings,
            dict(voices),
            tasks,
            sampling,
            seed,
        )
        count = max((self._of(part).held_out for part in self.voices), default=0)
        self.held = tasks.draw(count, (seed, "held out")) if count else []
        self.ids = {problem.id for problem in self.held}
        self.watched: dict[str, list[list[float]]] = {part: [] for part in self.voices}
        self.dropped: list[str] = []
        self.over = False

    def at(self, step: int) -> Tasks:
        """The stage's tasks as they are at a step: their scores with the opinions that count by then."""
        return _Heard(self, self._counting(step)) if self.voices else self.tasks

    def watch(self, step: int, groups: Sequence[Group], engine: Sampler) -> dict[str, Any]:
        """Metrics of the truth and of what the opinions cost, and an alarm where they part; `engine` has the weights of
        the step's end."""
        counting = self._counting(step)
        if not counting:
            return {}
        answers = [
            self.tasks.score(g)
            for g in engine.rollout(self.held, 1, self.sampling, (self.seed, "held out", step))
        ]
        truth = float(np.mean([group.scores[0].parts["accuracy"] for group in answers]))
        told = {
            "held_out_accuracy": truth,
            "held_out_tokens": sum(len(g.prompt_tokens) + len(g.completions[0].tokens) for g in answers),
        }
        alarms = [text for part in counting if (text := self._heed(part, groups, truth))]
        for voice in self.voices.values():
            told |= voice.bill()
        return {**told, "alarms": alarms} if alarms else told

    def state_dict(self) -> dict[str, Any]:
        return {"watched": self.watched, "dropped": self.dropped, "over": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watched, self.dropped, self.over = state["watched"], state["dropped"], state["over"]

    def _of(self, part: str) -> Opinion:
        return self.settings.learned_rewards[part]

    def _counting(self, step: int) -> list[str]:
        begins = {
            part: self.settings.steps - (self._of(part).last_steps or self.settings.steps)
            for part in self.voices
        }
        return [part for part, begin in begins.items() if step >= begin and part not in self.dropped]

    def asked(self, part: str, problem: Problem) -> bool:
        """Whether this opinion is asked about responses to a problem."""
        names = self._of(part).problems
        return not names or problem.id.partition("/")[0] in names

    def _heed(self, part: str, groups: Sequence[Group], truth: float) -> str:
        """Write the step down; what to say if this opinion has been hacked."""
        held = [
            s.parts[part] for g in groups if self.asked(part, g.problem) for s in g.scores if part in s.parts
        ]
        if not held:
            return ""
        self.watched[part] = [*self.watched[part], [float(np.mean(held)), truth]][-self._of(part).window :]
        if len(self.watched[part]) < self._of(part).window or not hacked(
            *zip(*self.watched[part], strict=True)
        ):
            return ""
        self.dropped.append(part)
        self.over = self._of(part).on_alarm == "stop"
        then = "the stage ends here" if self.over else "it no longer counts"
        return f"reward hacking: {part} rises while the truth on held-out problems does not: {then}"


class _Heard:
    """Tasks whose scores have opinions in them; held-out problems are never drawn."""

    def __init__(self, panel: Panel, counting: Sequence[str]):
        self.panel, self.counting = panel, counting

    def draw(self, count: int, seed: object, split: str = "train") -> list[Problem]:
        found: list[Problem] = []
        for again in range(PATIENCE):
            drawn = self.panel.tasks.draw(count, (seed, again) if again else seed, split)
            found += [problem for problem in drawn if problem.id not in self.panel.ids]
            if len(found) >= count:
                return found[:count]
        raise LimbeckError(
            "learned_rewards: held_out leaves no problem to learn from; lower it, or give more problems"
        )

    def score(self, group: Group) -> Group:
        group = self.panel.tasks.score(group)
        for part in self.counting:
            if self.panel.asked(part, group.problem):
                group = with_opinion(
                    group,
                    self.panel.voices[part].opinions([group])[0],
                    part,
                    self.panel.settings.rewards[part],
                )
        return group


def with_opinion(group: Group, opinions: Sequence[Score], part: str, worth: float) -> Group:
    """A scored group with one more part, which is added to the reward by its worth."""
    scores = tuple(
        replace(
            score,
            parts={**score.parts, **said.parts},
            reasons={**score.reasons, **said.reasons},
            stats={**score.stats, **said.stats},
        )
        for score, said in zip(group.scores, opinions, strict=True)
    )
    rewards = tuple(
        reward + worth * said.parts[part] for reward, said in zip(group.rewards, opinions, strict=True)
    )
    return replace(group, scores=scores, rewards=rewards)


def hacked(opinion: Sequence[float], truth: Sequence[float]) -> bool:
    """Whether, step by step, an opinion rose, away from a truth that did not clearly rise. A truth near 1 has to
    fall.

    >>> hacked([0.1, 0.2, 0.3, 0.41, 0.5], [0.5, 0.4, 0.5, 0.6, 0.5])
    True
    """
    opinion_S, truth_S = np.asarray(opinion), np.asarray(truth)
    still = trend(truth_S) < FALL if truth_S[: len(truth_S) // 2].mean() > CEILING else trend(truth_S) < CLEAR
    return bool(still and trend(opinion_S) > RISE and trend(opinion_S - truth_S) > WIDER)


def trend(values_S: np.ndarray) -> float:
    """The t value of the slope of a straight line through the values (least squares)."""
    n = len(values_S)
    steps_S = np.arange(n) - (n - 1) / 2
    spread = float((steps_S**2).sum())
    slope = float((steps_S * values_S).sum()) / spread
    rest_S = values_S - values_S.mean() - slope * steps_S
    error = float(np.sqrt((rest_S**2).sum() / (n - 2) / spread))
    return slope / max(error, 1e-9)
