"""The parts of a suite, each a frozen declaration: published files, protocols, prompts, metrics, sampling.

A suite is a benchmark; a protocol is one published way of measuring it. A suite has one protocol for each
harness that it is measured as. An item is one row of the benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]
Verdict = tuple[bool, ...]  # one value, or for instructions one for each of them
PROTOCOLS = ("deepseek", "lm-eval", "lighteval")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Source:
    """Where a definition or a number was published: `Source("gsm8k.yaml", "https://...", "3.0")`. `version`
    is the version or the date, "" if there is none."""

    title: str
    url: str
    version: str = ""


CONSENSUS = Source(
    "DeepSeek-R1, arXiv 2501.12948v1, section 3: cons@64 on AIME 2024, by majority vote (arXiv 2203.11171)",
    "https://arxiv.org/abs/2501.12948",
    "2025",
)


@dataclass(frozen=True)
class Item:
    """One row of a benchmark, for instance `Item("gsm8k/7", "How many ...?", gold="72")`.

    `choices` are the texts of a multiple choice's options in the order in which they are shown; `gold` is
    then the letter of the right one. `category` is the subject. `row` is the row as published."""

    id: str
    question: str
    gold: str
    choices: tuple[str, ...] = ()
    category: str = ""
    row: Row = field(default_factory=dict, hash=False)

    @property
    def letters(self) -> str:
        """The letters of the options: `ABCD`."""
        return LETTERS[: len(self.choices)]


@dataclass(frozen=True)
class Shots:
    """The worked examples before a question: `count` rows of the file `split`, or the pairs (question,
    answer) in `fixed`.

    `order` is how rows are chosen: the `first` ones of the item's category, or a `random` sample for each
    item in turn, from Python's generator with the seed 1234 (lm-eval, `api/samplers.py`)."""

    count: int
    split: str = ""
    order: Literal["first", "random"] = "first"
    fixed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The text that is put to the model.

    `template` has the placeholders `{question}`, `{choices}`, `{letters}` and `{category}`; `choice` is the
    line of one option, with `{letter}` and `{choice}`. A prompt with `chat` is rendered as a user's message
    with the model's chat template; another is the beginning of a text that the model continues.
    `description` stands before the examples. `answer` returns the answer of an example.
    """

    template: str
    choice: str = "{letter}) {choice}"
    chat: bool = True
    description: str = ""
    shots: Shots | None = None
    answer: Callable[[Item], str] | None = None

    def fill(self, item: Item) -> str:
        """Return the template with the item's texts."""
        lines = []
        for letter, choice in zip(item.letters, item.choices, strict=True):
            lines.append(fill(self.choice, letter=letter, choice=choice))
        return fill(
            self.template,
            question=item.question,
            choices="\n".join(lines),
            letters=item.letters,
            category=item.category,
        )


@dataclass(frozen=True)
class Metric:
    """A verdict on a response: `judge(item, response)` returns one value or, for a metric that is `pooled`
    over all items, several. `extraction` says in words where the answer is looked for, and what is compared.
    `answer(item, response)` returns the answer as a text that is equal for equal answers, None if there is
    none; a metric that has it can be put to the vote.
    """

    name: str
    judge: Callable[[Item, str], Verdict]
    extraction: str
    pooled: bool = False
    answer: Callable[[Item, str], str | None] | None = None


@dataclass(frozen=True)
class SuiteSampling:
    """How responses are sampled: `samples` of each item, cut off before the first text in `stop`."""

    temperature: float
    top_p: float
    max_new_tokens: int
    samples: int = 1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """One published way of measuring a suite. The first metric makes the headline.

    Without `sampling` the options are ranked by their log-likelihood: `acc` takes the sum over the tokens,
    `acc_norm` divides it by the number of characters (lm-eval, `api/task.py`). `options` are the texts that
    are scored, in place of the letters."""

    name: str
    source: Source
    prompt: Prompt
    metrics: tuple[Metric, ...] = ()
    sampling: SuiteSampling | None = None
    options: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """A benchmark. `files` are patterns of the file names by split, as published at `home`; `test` is asked.

    `read` turns the rows of a split into items, given the protocol's name, which may decide the order of
    options. `fields` are the columns that a row must have. `size` is the published number of items."""

    name: str
    title: str
    paper: Source
    home: str
    files: Mapping[str, tuple[str, ...]]
    fields: tuple[str, ...]
    size: int
    read: Callable[[Sequence[Row], str], list[Item]]
    protocols: tuple[Protocol, ...]
    requires: Callable[[Sequence[Item]], str] = lambda items: ""


def fill(template: str, **values: str) -> str:
    """Return the template with each `{name}` replaced by the value of that name. Other braces stay, and a
    value is never read as a template."""
    names = "|".join(values)
    return re.sub(rf"\{{({names})\}}", lambda match: values[match[1]], template)


def after_thought(text: str) -> str:
    """Return what follows the last `</think>`, or the whole text if there is none."""
    return text.rpartition("</think>")[2]
