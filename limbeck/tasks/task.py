"""Sources of problems: opening them, mixing them, judging completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..config.recipe import Files, Gym, Miniature, Problems
from ..text.tokenizer import split_thought
from ..types import Completion, Group, LimbeckError, Problem, Score, Task, generator
from . import reward_parts
from .answers import Verdict, extract


def open_task(name: str, settings: Problems, base: Path = Path()) -> Task:
    """The source that a recipe describes; paths in it are relative to `base`."""
    match settings:
        case Miniature():
            from .clock_countdown import Countdown

            return Countdown(name, settings)
        case Gym():
            from .gym import GymTask

            return GymTask(name, settings)
        case Files():
            from .files import FileTask

            return FileTask(name, settings, base)
    raise LimbeckError(f"problems.{name}: no such source as {type(settings).__name__}")


# ---------------------------------------------------------------- one completion


def judged(problem: Problem, completion: Completion, style: str, compare: Callable[[str], Verdict]) -> Score:
    """Score a completion whose answer `compare` can judge: parts accuracy, format and language.

    `language` is absent, and so earns nothing, where there are no words to judge; where no thought is
    marked, the whole text is one. An answer that ran out of tokens is not correct, whatever it says.
    """
    text, thought = completion.text, split_thought(completion.text).thought or completion.text
    parts, reasons, verdict = {"accuracy": 0.0}, {}, None
    found = extract(text, style)
    if not completion.stopped:
        reasons["accuracy"] = "ran out of tokens"
    elif found.answer is None:
        reasons["accuracy"] = found.reason
    else:
        verdict = compare(found.answer)
        parts["accuracy"] = float(verdict is Verdict.CORRECT)
        if verdict is not Verdict.CORRECT:
            reasons["accuracy"] = f"{verdict.value}: answer {found.answer[:80]}, gold {problem.answer}"
    parts["format"], fault = reward_parts.format_score(text, style)
    if fault:
        reasons["format"] = fault
    consistency = reward_parts.language_consistency(thought, problem.language)
    if consistency is not None:
        parts["language"] = consistency
        if consistency == 0:
            reasons["language"] = f"no word of {problem.language}"
    return Score(parts, reasons, _measured(thought, verdict), found.answer or "")


def _measured(thought: str, verdict: Verdict | None) -> dict[str, float]:
    """What is watched and not paid for; the means of the last three are the verifier's failure rates."""
    failures = (Verdict.UNPARSED, Verdict.TIMEOUT, Verdict.ERROR)
    return {
        "reflections": float(reward_parts.reflections(thought)),
        "repeats": float(reward_parts.repeats(thought)),
        **{failure.value: float(verdict is failure) for failure in failures},
    }


def written(instruction: str, question: str, where: str) -> str:
    """The prompt: `{problem}` in the instruction replaced, other braces (`\\boxed{}`) left as they are."""
    if "{problem}" not in instruction:
        raise LimbeckError(f"{where}: instruction has no {{problem}}; put it where the question belongs")
    return instruction.replace("{problem}", question)


# ---------------------------------------------------------------- many tasks


class Mixture:
    """Several tasks drawn from by weight, and judged with one set of reward weights.

    `weights` has one positive share for each task and `rewards` the worth of each part of a score;
    `subsets` are training problems under names of their own, as a screening leaves them.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        weights: Mapping[str, float],
        rewards: Mapping[str, float],
        subsets: Mapping[str, Sequence[Problem]] | None = None,
    ):
        known = [*tasks, *(subsets or {})]
        shares = {name: float(weights.get(name, 0.0)) for name in known}
        for name, weight in weights.items():
            if name not in known or not 0 <= weight < float("inf"):
                raise LimbeckError(
                    f"problems.{name}: {weight} is no share of a task; tasks are {', '.join(known)}"
                )
        if not sum(shares.values()):
            raise LimbeckError(
                f"problems: the shares of {', '.join(tasks) or 'no task'} add up to 0; give one a share"
            )
        self.tasks, self.rewards, self.subsets = dict(tasks), dict(rewards), dict(subsets or {})
        self.shares = {name: share / sum(shares.values()) for name, share in shares.items() if share}

    def problems(self, name: str, split: str = "train") -> Sequence[Problem]:
        """All problems of one task, or of the subset that stands for it."""
        return (
            self.subsets[name]
            if split == "train" and name in self.subsets
            else self.tasks[name].problems(split)
        )

    def draw(self, count: int, seed: object, split: str = "train") -> list[Problem]:
        """`count` problems, the same for the same seed; none comes twice before its task is used up."""
        names = list(self.shares)
        picks = generator("draw", seed, split).choice(len(names), size=count, p=list(self.shares.values()))
        drawn = {}
        for i, name in enumerate(names):
            pool, wanted = self.problems(name, split), int((picks == i).sum())
            if wanted and not pool:
                raise LimbeckError(
                    f"problems.{name}: no {split} problems are left to draw; raise its size or its limit"
                )
            drawn[name] = iter([pool[j] for j in _indices(len(pool), wanted, (seed, split, name))])
        return [next(drawn[names[pick]]) for pick in picks]

    def score(self, group: Group) -> Group:
        """A copy of the group with its scores and rewards: the sum of worth times part, absent parts 0."""
        task = self.tasks[group.problem.id.partition("/")[0]]
        scores = tuple(task.score(group.problem, completion) for completion in group.completions)
        return replace(group, scores=scores, rewards=tuple(self._worth(score) for score in scores))

    def _worth(self, score: Score) -> float:
        if score.skipped:
            return 0.0
        return float(sum(worth * score.parts.get(part, 0.0) for part, worth in self.rewards.items()))


def _indices(size: int, wanted: int, key: tuple) -> list[int]:
    """`wanted` indices below `size`: rounds of all of them, each in a new order, the last one cut short."""
    indices: list[int] = []
    while len(indices) < wanted:
        rng = generator("indices", *key, len(indices))
        indices += rng.choice(size, min(size, wanted - len(indices)), replace=False).tolist()
    return indices
