"""Mixtures of tasks: problems drawn by weight, and rewards as weighted sums of score parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..types import Group, LimbeckError, Problem, Score, Task, generator


class Mixture:
    """Several tasks drawn from by weight, with one set of reward weights.

    `weights` has a positive share for each task, `rewards` the weight of each part of a score; `subsets`
    replace the training problems of the tasks under their names, as a screening leaves them. Raises
    LimbeckError for a share of an unknown task, a negative one, or none at all.
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

    def problems(self, name: str, split: str = "train") -> Sequence[Problem]:
        """All problems of one task, or of the subset in its place."""
        if split == "train" and name in self.subsets:
            return self.subsets[name]
        return self.tasks[name].problems(split)

    def draw(self, count: int, seed: object, split: str = "train") -> list[Problem]:
        """`count` problems, the same for the same seed; none is repeated before its task is used up.

        Raises LimbeckError if a task with a share has no problems.
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
        """A copy of the group with its scores and rewards."""
        task = self.tasks[group.problem.id.partition("/")[0]]
        scores = tuple(task.score(group.problem, completion) for completion in group.completions)
        rewards = tuple(self._reward(score) for score in scores)
        return replace(group, scores=scores, rewards=rewards)

    def _reward(self, score: Score) -> float:
        """The weighted sum of a score's parts, absent parts 0."""
        if score.skipped:
            return 0.0
        return float(sum(weight * score.parts.get(part, 0.0) for part, weight in self.rewards.items()))


def _sample_indices(size: int, count: int, key: tuple) -> list[int]:
    """`count` indices below `size`: rounds through all of them, each in a new order, the last one cut
    short."""
    indices: list[int] = []
    while len(indices) < count:
        rng = generator("indices", *key, len(indices))
        indices += rng.choice(size, min(size, count - len(indices)), replace=False).tolist()
    return indices
