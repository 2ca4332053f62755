"""Problem generators of the library reasoning-gym as tasks: any number of problems, and a judge of their
answers, without a data set."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

from ..config import recipe
from ..types import Completion, LimbeckError, Problem, Score, fingerprint
from . import answers, generators
from .answers import Verdict
from .grammar import ParseError
from .rewards import fill_template, grade
from .sandbox import SANDBOX
from .worked_steps import write_response

SCORER_DEADLINE = 2.0  # seconds of processor time
MIN_SIMILARITY = 0.5  # difflib's ratio from which a name is suggested

Entry = dict[str, Any]


class GymTask:
    """The problems of one reasoning-gym generator. Train and test are generated with different seeds and have
    no question in common. `name` is the task's key in the recipe.

    If the gold (reference) answer is a whole number, answers are judged by `answers.judge`. Others are judged
    as the module `generators` prescribes: compared with the gold answer, parsed, or passed, if they have the
    expected form, to the generator's own scorer in the sandbox. `skipped` counts the generated entries that
    have no gold answer and no such scorer. Raises LimbeckError for an unknown or refused generator, an
    invalid config, or if too few entries are usable.
    """

    def __init__(self, name: str, settings: recipe.Gym):
        self.name = name
        self.settings = settings
        self._kind = _generator(name, settings)
        self._entries: dict[str, Entry] = {}
        self.skipped = 0
        test = self._problems("test", settings.held_out, taken=set())
        questions = {problem.data["question"] for problem in test}
        train = self._problems("train", settings.size, taken=questions)
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
        """Return the problems of the split `train` or `test`. Repeated questions are removed, so there may be
        fewer problems than the recipe's size."""
        return self._splits[split]

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Return the score of a completion, with the parts accuracy, format and language."""
        style = self.settings.answer
        return grade(problem, completion, style, lambda answer: self._compare(problem, answer))

    def work_out(self, problem: Problem) -> str | None:
        """Return a response with the worked steps of the sum in the question, None if there is none."""
        return write_response(problem.data["question"], self.settings.answer)

    def _compare(self, problem: Problem, answer: str) -> Verdict:
        gold = problem.answer or ""
        generator = self.settings.generator
        if _is_whole(gold) or not _has_scorer(self._kind) or generator in generators.NUMBERS:
            return answers.judge(gold, answer)
        entry = self._entries[problem.id]
        try:
            correct = generators.compare(generator, answer, entry)
        except ParseError:
            return Verdict.UNPARSED
        if correct is None:
            return self._judge_in_sandbox(entry, answer)
        return Verdict.CORRECT if correct else Verdict.WRONG

    def _judge_in_sandbox(self, entry: Entry, answer: str) -> Verdict:
        if self.settings.generator in generators.SYMBOLIC:
            facts = entry["metadata"]
            question = ["integral", facts["integrand"], facts["variable"]]
        else:
            config = json.dumps(self.settings.config, sort_keys=True)
            question = ["scorer", self.settings.generator, config, generators.pack(entry)]
        return Verdict(SANDBOX.ask(*question, answer=answer, deadline=SCORER_DEADLINE))

    def _problems(self, split: str, count: int, taken: set[str]) -> list[Problem]:
        """Generate `count` entries and return the problems with different questions, none of which is in
        `taken`."""
        # The generators seed entry i with seed + i, so neighbouring seeds would share nearly all entries.
        seed = fingerprint("gym", self.settings.generator, self.settings.seed, split) % 2**31
        problems: list[Problem] = []
        seen = set(taken)
        for i, entry in enumerate(_create(self.name, self.settings, seed, count)):
            if not entry["answer"] and self.settings.generator not in generators.SCORED:
                self.skipped += 1
            elif entry["question"] not in seen:
                seen.add(entry["question"])
                problems.append(self._problem(f"{split}-{i}", entry))
        return problems

    def _problem(self, number: str, entry: Entry) -> Problem:
        question = entry["question"]
        problem = Problem(
            id=f"{self.name}/{number}",
            prompt=fill_template(self.settings.template, question, f"problems.{self.name}"),
            answer=entry["answer"],
            origin=f"reasoning-gym:{self.settings.generator}",
            data={"question": question},
            system=self.settings.system or "",
            template=self.settings.template,
        )
        self._entries[problem.id] = entry
        return problem


def _is_whole(gold: str) -> bool:
    return gold.lstrip("-").isdecimal()


def _generator(name: str, settings: recipe.Gym) -> type:
    """Return the class of the generator that `settings` name. Raises LimbeckError if reasoning-gym is not
    installed, for an unknown or refused generator, or for an unknown key in its config."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise LimbeckError(
            f"problems.{name}: reasoning-gym is not installed; run pip install 'limbeck[gym]'"
        ) from None
    if settings.generator not in DATASETS:
        hint = _suggestion(settings.generator, DATASETS)
        raise LimbeckError(f"problems.{name}.generator: reasoning-gym has no {settings.generator}{hint}")
    kind, config = DATASETS[settings.generator]
    if _has_scorer(kind):
        _check_audited(name, settings.generator)
    _check_config(name, settings, {field.name for field in dataclasses.fields(config)})
    return kind


def _has_scorer(kind: type) -> bool:
    """Return True if the generator's class `kind` overrides the library's default scorer."""
    from reasoning_gym.dataset import ProceduralDataset

    return kind.score_answer is not ProceduralDataset.score_answer


def _check_config(name: str, settings: recipe.Gym, fields: set[str]) -> None:
    """Raise LimbeckError if `config` has a key that is not in `fields`, the generator's own keys, or that the
    recipe sets elsewhere (seed and size)."""
    keys = fields - {"seed", "size"}
    for key in settings.config:
        if key in ("seed", "size"):
            raise LimbeckError(
                f"problems.{name}.config.{key}: write it one level up, as problems.{name}.{key}"
            )
        if key not in keys:
            raise LimbeckError(
                f"problems.{name}.config: {settings.generator} has no key {key}{_suggestion(key, keys)}"
            )


def _check_audited(name: str, generator: str) -> None:
    """Raise LimbeckError if the generator is refused, if its scorer was not audited in the installed version,
    or if it needs the sandbox and the sandbox does not work on this machine."""
    where = f"problems.{name}.generator: {generator}"
    if generator in generators.REFUSED:
        raise LimbeckError(f"{where} is refused: {generators.REFUSED[generator]}")
    if not generators.is_audited(generator):
        raise LimbeckError(
            f"{where} is refused: its scorer was never read, and may evaluate what a model writes; "
            "choose another"
        )
    if not generators.needs_sandbox(generator):
        return
    installed = metadata.version("reasoning-gym")
    if installed != generators.AUDITED:
        raise LimbeckError(
            f"{where} is refused: the scorers of reasoning-gym {installed} were never read; "
            f"run pip install reasoning-gym=={generators.AUDITED}, or choose another"
        )
    proof = SANDBOX.proof()
    if not proof.holds:
        raise LimbeckError(
            f"{where} is refused: its scorer may reach too much here ({proof}); "
            "use Linux 3.5 or later with seccomp, or a generator with whole-number answers such as chain_sum"
        )


def _create(name: str, settings: recipe.Gym, seed: int, size: int) -> Any:
    """Return a reasoning-gym data set of `size` entries. Raises LimbeckError if the generator refuses the
    values in its config."""
    from reasoning_gym.factory import create_dataset

    try:
        return create_dataset(settings.generator, **settings.config, seed=seed, size=size)
    except (AssertionError, TypeError, ValueError) as error:  # its ways of refusing a config
        raise LimbeckError(f"problems.{name}.config: {settings.generator} refuses it ({error})") from None


def _suggestion(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message for an unknown name `word`: the most similar known name, or a list
    of all known names."""
    names = list(known)
    close = difflib.get_close_matches(word, names, 1, MIN_SIMILARITY)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names))}"
