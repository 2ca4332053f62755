"""Any generator of reasoning-gym as a task: endless problems with a checker, no data set needed."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from ..config import recipe
from ..types import Completion, LimbeckError, Problem, Score, fingerprint
from . import answers, generators
from .answers import Verdict
from .grammar import Unread
from .referee import REFEREE
from .task import judged, written


class GymTask:
    """Problems of one generator. Train and test have different seeds, and no question in common.

    A whole-number answer is judged by `answers.judge`, any other as `generators` says: compared with the gold
    one, read by a grammar, or handed, in a form that is known, to the generator's own scorer in a process that
    reaches nothing. `skipped` counts the entries that have neither an answer nor such a scorer.
    """

    def __init__(self, name: str, settings: recipe.Gym):
        self.name, self.settings = name, settings
        self._kind = _generator(name, settings)
        self._entries: dict[str, dict[str, Any]] = {}
        self.skipped = 0
        test = self._problems("test", settings.held_out, taken=set())
        train = self._problems("train", settings.size, taken={problem.data["question"] for problem in test})
        if 2 * self.skipped > settings.size + settings.held_out:
            raise LimbeckError(
                f"problems.{name}: most entries of {settings.generator} have no answer; choose another"
            )
        if not train:
            raise LimbeckError(
                f"problems.{name}: every question of {settings.generator} is in the test as well; "
                "make its config harder, or held_out smaller"
            )
        self._splits = {"train": train, "test": test}

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of `train` or `test`, each question once: there may be fewer than were asked for."""
        return self._splits[split]

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Accuracy, format and language."""
        return judged(
            problem, completion, self.settings.answer, lambda answer: self._compare(problem, answer)
        )

    def _compare(self, problem: Problem, answer: str) -> Verdict:
        gold, generator = problem.answer or "", self.settings.generator
        if _whole(gold) or not self._scores_itself() or generator in generators.NUMBERS:
            return answers.judge(gold, answer)
        try:
            right = generators.compared(generator, answer, self._entries[problem.id])
        except Unread:
            return Verdict.UNPARSED
        if right is not None:
            return Verdict.CORRECT if right else Verdict.WRONG
        return self._asked(self._entries[problem.id], answer)

    def _asked(self, entry: dict[str, Any], answer: str) -> Verdict:
        """What a process that reaches nothing says."""
        if self.settings.generator in generators.SYMBOLIC:
            known = entry["metadata"]
            question = ["integral", known["integrand"], known["variable"]]
        else:
            config = json.dumps(self.settings.config, sort_keys=True)
            question = ["scorer", self.settings.generator, config, generators.packed(entry)]
        return Verdict(REFEREE.ask(*question, answer=answer, deadline=2.0))

    def _scores_itself(self) -> bool:
        return _scores_itself(self._kind)

    def _problems(self, split: str, count: int, taken: set[str]) -> list[Problem]:
        # the generators seed entry i with seed + i, so neighbouring seeds would share nearly all entries
        seed = fingerprint("gym", self.settings.generator, self.settings.seed, split) % 2**31
        problems, taken = [], set(taken)
        for i, entry in enumerate(_create(self.name, self.settings, seed, count)):
            if not entry["answer"] and self.settings.generator not in generators.SCORED:
                self.skipped += 1
            elif entry["question"] not in taken:
                taken.add(entry["question"])
                problems.append(self._problem(f"{split}-{i}", entry))
        return problems

    def _problem(self, id: str, entry: dict[str, Any]) -> Problem:
        problem = Problem(
            id=f"{self.name}/{id}",
            prompt=written(self.settings.instruction, entry["question"], f"problems.{self.name}"),
            answer=entry["answer"],
            origin=f"reasoning-gym:{self.settings.generator}",
            data={"question": entry["question"]},
        )
        self._entries[problem.id] = entry
        return problem


def _whole(gold: str) -> bool:
    return gold.lstrip("-").isdecimal()


def _generator(name: str, settings: recipe.Gym) -> type:
    """The generator's class, once its name and the keys of its config are known to be right."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise LimbeckError(
            f"problems.{name}: reasoning-gym is not installed; run pip install 'limbeck[gym]'"
        ) from None
    if settings.generator not in DATASETS:
        hint = _meant(settings.generator, DATASETS)
        raise LimbeckError(f"problems.{name}.generator: reasoning-gym has no {settings.generator}{hint}")
    kind, config = DATASETS[settings.generator]
    if _scores_itself(kind):
        _admit(name, settings.generator)
    keys = {field.name for field in dataclasses.fields(config)} - {"seed", "size"}
    for key in settings.config:
        if key in ("seed", "size"):
            raise LimbeckError(
                f"problems.{name}.config.{key}: write it one level up, as problems.{name}.{key}"
            )
        if key not in keys:
            raise LimbeckError(
                f"problems.{name}.config: {settings.generator} has no key {key}{_meant(key, keys)}"
            )
    return kind


def _scores_itself(kind: type) -> bool:
    from reasoning_gym.dataset import ProceduralDataset

    return kind.score_answer is not ProceduralDataset.score_answer


def _admit(name: str, generator: str) -> None:
    """Refuse a generator whose scorer nobody read, or that must run apart where nothing keeps it there."""
    where = f"problems.{name}.generator: {generator}"
    if generator in generators.REFUSED:
        raise LimbeckError(f"{where} is refused: {generators.REFUSED[generator]}")
    if not generators.known(generator):
        raise LimbeckError(
            f"{where} is refused: its scorer was never read, and may evaluate what a model writes; choose another"
        )
    if not generators.judged_apart(generator):
        return
    if (installed := metadata.version("reasoning-gym")) != generators.AUDITED:
        raise LimbeckError(
            f"{where} is refused: the scorers of reasoning-gym {installed} were never read; "
            f"run pip install reasoning-gym=={generators.AUDITED}, or choose another"
        )
    if not (proof := REFEREE.proof()).holds:
        raise LimbeckError(
            f"{where} is refused: its scorer may reach too much here ({proof}); "
            "use Linux 3.5 or later with seccomp, or a generator with whole-number answers such as chain_sum"
        )


def _create(name: str, settings: recipe.Gym, seed: int, size: int) -> Any:
    from reasoning_gym.factory import create_dataset

    try:
        return create_dataset(settings.generator, **settings.config, seed=seed, size=size)
    except (AssertionError, TypeError, ValueError) as error:  # its way of refusing a user's config
        raise LimbeckError(f"problems.{name}.config: {settings.generator} refuses it ({error})") from None


def _meant(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"
