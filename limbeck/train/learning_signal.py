"""The learning signal of a step of reinforcement learning: whether the rewards within a group differ and, if
not, what was seen and which setting of the recipe helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..config.parts import Policy
from ..config.recipe import RL, Problems
from ..types import Group

NO_SIGNAL = "no learning signal"  # the name of the alarm, with which its message begins
NO_ANSWER = "no answer"
UNTAUGHT = (NO_SIGNAL, NO_ANSWER)
NEARLY_ALL = 0.9  # share of cut-off responses from which the token limit is blamed


def has_signal(groups: Sequence[Group], policy: Policy) -> bool:
    """Return True if a step's scored groups give a gradient of the reward: in one of them the rewards differ,
    and one of its completions is learned from."""
    return any(
        len(set(group.rewards)) > 1
        and (not policy.mask_truncated or any(completion.stopped for completion in group.completions))
        for group in groups
    )


def has_answers(groups: Sequence[Group]) -> bool:
    """Return True if the verifier found an answer, right or wrong, in any completion of the scored groups."""
    scores = [score for group in groups for score in group.scores]
    return any(score.answer or score.parts.get("accuracy") for score in scores)


@dataclass(frozen=True)
class Finding:
    """What a step without a learning signal looks like, and the remedy.

    `Finding("every response is right", "give harder problems")`. It is `evident` if one step is enough to
    tell; equal rewards may be chance in a small step."""

    seen: str
    remedy: str
    evident: bool = False

    def __str__(self) -> str:
        return f"{self.seen}; {self.remedy}"


class Diagnosis:
    """Finds out why the groups of a step give no learning signal.

    `name` is the stage's name in the recipe; `problems` are the settings of its sources of problems, by
    name."""

    def __init__(self, settings: RL, name: str, problems: Mapping[str, Problems]):
        self.settings = settings
        self.stage = f"stages.{name}"
        self.problems = problems

    def of(self, groups: Sequence[Group]) -> Finding:
        """Return the first cause that fits all of the scored groups of a step."""
        causes: list[Callable[[Sequence[Group]], Finding | None]] = [
            self._truncated,
            self.unanswered,
            self._identical,
            self._wrong_or_right,
        ]
        findings = (cause(groups) for cause in causes)
        alike = Finding(
            "the responses to each problem earn equal rewards",
            f"raise {self.stage}.policy.group_size or {self.stage}.sampling.temperature",
        )
        return next((finding for finding in findings if finding), alike)

    def _truncated(self, groups: Sequence[Group]) -> Finding | None:
        completions = [completion for group in groups for completion in group.completions]
        cut = sum(not completion.stopped for completion in completions)
        if cut < NEARLY_ALL * len(completions):
            return None
        return Finding(
            f"nearly every response is cut off at max_new_tokens = {self.settings.sampling.max_new_tokens}",
            f"raise {self.stage}.sampling.max_new_tokens",
            evident=True,
        )

    def unanswered(self, groups: Sequence[Group]) -> Finding | None:
        """Return the finding that no completion has an answer that the verifier can find; None if one has, or
        if accuracy earns nothing."""
        if has_answers(groups) or not self.settings.rewards.get("accuracy"):
            return None
        source = min(group.problem.id.partition("/")[0] for group in groups)
        remedy = f"teach {self.settings.model} that form first, with an sft stage"
        if hasattr(self.problems.get(source), "answer"):
            keys = f"problems.{source}.template, or set problems.{source}.answer"
            remedy = f"ask for that form in {keys} to the form that the model writes"
        return Finding("no response has an answer where the verifier looks for it", remedy, evident=True)

    def _identical(self, groups: Sequence[Group]) -> Finding | None:
        if any(len({completion.text for completion in group.completions}) > 1 for group in groups):
            return None
        return Finding(
            "the responses to each problem are the same text",
            f"raise {self.stage}.sampling.temperature",
            evident=True,
        )

    def _wrong_or_right(self, groups: Sequence[Group]) -> Finding | None:
        accuracies = {score.parts.get("accuracy") for group in groups for score in group.scores}
        screen = f"cite a screen stage in {self.stage}.problems, which keeps those that are sometimes solved"
        if accuracies == {0.0}:
            return Finding("every response is wrong", f"give easier problems, or {screen}")
        if accuracies == {1.0}:
            return Finding("every response is right", f"give harder problems, or {screen}")
        return None
