"""Sums of a few whole numbers as a task, written as expressions or told as stories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..config import recipe
from ..types import Completion, Problem, Score, fingerprint, generator
from . import answers
from .rewards import fill_template, grade
from .worked_steps import join_steps

DRAWS = 20  # for each wanted problem: where fewer different sums exist, drawing ends
HELD_OUT = 4  # one sum in so many is held out

PEOPLE = ("Ada", "Bruno", "Clara", "Dev", "Emil", "Fay", "Hana", "Ivo", "Jun", "Kofi", "Lin", "Nils", "Ola")
THINGS = (
    "apples",
    "beads",
    "books",
    "cards",
    "coins",
    "eggs",
    "keys",
    "plates",
    "shells",
    "stamps",
    "stones",
)
GAINS = ("gets {} more", "buys {} more", "finds {} more")
LOSSES = ("gives {} away", "loses {}", "sells {}")

Terms = tuple[int, ...]  # (8, -6, 3) is 8 - 6 + 3


class SumTask:
    """Sums that are worked out from left to right, such as "What is 8 - 6 + 3?". `name` is the task's key in
    the recipe.

    A sum is held out by its own fingerprint (hash), so that no source of sums trains on a sum that another
    one tests, whatever its range or its story.
    """

    def __init__(self, name: str, settings: recipe.Sums):
        self.name = name
        self.settings = settings
        self._splits = {
            split: [self._problem(f"{split}-{i}", terms) for i, terms in enumerate(sums)]
            for split, sums in _draw_sums(settings).items()
        }

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of the split `train` or `test`, fewer than the settings ask for where there are
        fewer different sums."""
        return self._splits[split]

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Return the score of a completion, with the parts accuracy, format and language."""
        gold = problem.answer or ""
        return grade(problem, completion, self.settings.answer, lambda answer: answers.judge(gold, answer))

    def work_out(self, problem: Problem) -> str:
        """Return a response with the worked steps of the sum, also of one that is told as a story."""
        terms = problem.data["terms"]
        return join_steps(_write_steps(terms), sum(terms), self.settings.answer)

    def _problem(self, number: str, terms: Terms) -> Problem:
        question = _tell(terms, self.settings.seed) if self.settings.story else f"What is {_write(terms)}?"
        return Problem(
            id=f"{self.name}/{number}",
            prompt=fill_template(self.settings.template, question, f"problems.{self.name}"),
            answer=str(sum(terms)),
            origin="sums",
            data={"question": question, "terms": terms},
            system=self.settings.system or "",
            template=self.settings.template,
        )


def _draw_sums(settings: recipe.Sums) -> dict[str, list[Terms]]:
    """Return the different sums of the splits `train` and `test`: as many as the settings ask for, or as were
    found in `DRAWS` draws for each."""
    wanted = {"train": settings.size, "test": settings.held_out}
    sums: dict[str, dict[Terms, None]] = {split: {} for split in wanted}
    random = generator("sums", settings.seed)
    for _ in range(DRAWS * sum(wanted.values())):
        terms = _draw_terms(settings, random)
        split = "test" if fingerprint("held out", terms) % HELD_OUT == 0 else "train"
        if len(sums[split]) < wanted[split]:
            sums[split][terms] = None
        elif all(len(sums[split]) == wanted[split] for split in wanted):
            break
    return {split: list(found) for split, found in sums.items()}


def _draw_terms(settings: recipe.Sums, random: np.random.Generator) -> Terms:
    """Return the terms of one sum: a minus half of the time, where no partial result falls below zero or the
    settings allow it."""
    count = int(random.integers(settings.min_terms, settings.max_terms + 1))
    terms = [int(random.integers(1, settings.largest + 1))]
    for _ in range(count - 1):
        term = int(random.integers(1, settings.largest + 1))
        minus = random.random() < 0.5 and (settings.negative or sum(terms) >= term)
        terms.append(-term if minus else term)
    return tuple(terms)


def _write(terms: Terms) -> str:
    """Return the sum as an expression.

    >>> _write((8, -6, 3))
    '8 - 6 + 3'
    """
    return " ".join([str(terms[0]), *(f"{'-' if term < 0 else '+'} {abs(term)}" for term in terms[1:])])


def _write_steps(terms: Terms) -> Iterator[str]:
    """Yield the steps of a sum from left to right.

    >>> list(_write_steps((8, -6, 3)))
    ['8 - 6 = 2.', '2 + 3 = 5.']
    """
    total = terms[0]
    for term in terms[1:]:
        yield f"{_write((total, term))} = {total + term}."
        total += term


def _tell(terms: Terms, seed: int) -> str:
    """Return a story that asks for the sum.

    >>> _tell((8, -6, 3), 0)
    'Ada has 8 shells. Ada sells 6, then buys 3 more. How many shells does Ada have now?'
    """
    random = generator("story", seed, terms)
    who, what = random.choice(PEOPLE), random.choice(THINGS)
    events = [random.choice(LOSSES if term < 0 else GAINS).format(abs(term)) for term in terms[1:]]
    return (
        f"{who} has {terms[0]} {what}. {who} {', then '.join(events)}. How many {what} does {who} have now?"
    )
