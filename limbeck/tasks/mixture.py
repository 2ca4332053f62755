"""Mixtures of tasks: problems are drawn from several tasks, and rewards are weighted sums of the parts of a
score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..text.prompt_format import PromptFormat
from ..types import Group, LimbeckError, Problem, Task, generator
from .rewards import weighted_sum


class Mixture:
    """Several tasks from which problems are drawn, with the weights of a reward that all of them share.

    `weights` has the relative probability of each task (a task without one is never drawn), `rewards` the
    weight of each part of a score. `subsets` maps names to lists of training problems, for instance the
    problems that a screening kept, which replace the training problems of the task with that name. Raises
    LimbeckError if a weight is negative or of an unknown task, or if all are 0.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        weights: Mapping[str, float],
        rewards: Mapping[str, float],
        subsets: Mapping[str, Sequence[Problem]] | None = None,
    ):
        self.tasks = dict(tasks)
        self.rewards = dict(rewards)
        self.subsets = dict(subsets or {})
        names = [*self.tasks, *self.subsets]
        for name, weight in weights.items():
            if name not in names or not 0 <= weight < float("inf"):
                raise LimbeckError(
                    f"problems.{name}: {weight} is no share of a task; tasks are {', '.join(names)}"
                )
        shares = {name: float(weights.get(name, 0.0)) for name in names}
        total = sum(shares.values())
        if not total:
            raise LimbeckError(
                f"problems: the shares of {', '.join(tasks) or 'no task'} add up to 0; give one a share"
            )
        self.shares = {name: share / total for name, share in shares.items() if share}

    @property
    def prompt_format(self) -> PromptFormat:
        """The format of the prompts of the task that is drawn most often."""
        name = max(self.shares, key=lambda name: self.shares[name])
        for problem in self.problems(name)[:1]:
            return PromptFormat(problem.system, problem.template)
        return PromptFormat()

    def problems(self, name: str, split: str = "train") -> Sequence[Problem]:
        """Return all problems of the task `name` in a split; for `train`, its subset if there is one."""
        if split == "train" and name in self.subsets:
            return self.subsets[name]
        return self.tasks[name].problems(split)

    def draw(self, count: int, seed: object, split: str = "train") -> list[Problem]:
        """Return `count` random problems of a split, the same for the same seed. A problem is repeated only
        after all problems of its task were drawn.

        Raises LimbeckError if a task from which to draw has no problems in this split.
        """
        names = list(self.shares)
        probabilities = list(self.shares.values())
        picks = generator("draw", seed, split).choice(len(names), size=count, p=probabilities)
        drawn = {}
        for i, name in enumerate(names):
            pool = self.problems(name, split)
            wanted = int((picks == i).sum())
            if wanted and not pool:
                raise LimbeckError(
                    f"problems.{name}: no {split} problems are left to draw; raise its size or its limit"
                )
            indices = _sample_indices(len(pool), wanted, (seed, split, name))
            drawn[name] = iter([pool[index] for index in indices])
        return [next(drawn[names[pick]]) for pick in picks]

    def score(self, group: Group) -> Group:
        """Return a copy of the group with the scores and the rewards of its completions. Scores that a group
        has from where it was sampled (cluster/fleet.py) are kept."""
        task = self.tasks[group.problem.id.partition("/")[0]]
        scores = group.scores or tuple(task.score(group.problem, one) for one in group.completions)
        rewards = tuple(weighted_sum(score, self.rewards) for score in scores)
        return replace(group, scores=scores, rewards=rewards)


def _sample_indices(size: int, count: int, key: tuple) -> list[int]:
    """Return `count` random indices below `size`. All indices are drawn once, in random order, before any is
    drawn again."""
    indices: list[int] = []
    while len(indices) < count:
        rng = generator("indices", *key, len(indices))
        indices += rng.choice(size, min(size, count - len(indices)), replace=False).tolist()
    return indices
