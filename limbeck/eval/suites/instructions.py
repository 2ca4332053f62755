"""The suite of instruction following: IFEval."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ...types import LimbeckError
from .instruction_checks import CHECKS, follows, loosened, missing_package
from .mathematics import LIGHTEVAL, LM_EVAL, R1_README, greedy, reasoning
from .suite import Item, Metric, Prompt, Protocol, Row, Source, Suite, Verdict, after_thought


def _read(rows: Sequence[Row], _: str) -> list[Item]:
    return [Item(f"ifeval/{row['key']}", row["prompt"], "", row=_checked(row)) for row in rows]


def _checked(row: Row) -> Row:
    """Return the row, once each of its instructions has a check and the arguments that the check takes.
    Raises LimbeckError otherwise."""
    for instruction, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        where = f"{row['_file']}, key {row['key']}"
        if instruction not in CHECKS:
            raise LimbeckError(f"{where}: there is no check of {instruction}; leave the row out")
        expected = list(inspect.signature(CHECKS[instruction]).parameters)[1:]
        if sorted(_arguments(arguments)) != sorted(expected):
            raise LimbeckError(
                f"{where}: {instruction} takes {', '.join(expected) or 'no arguments'} in kwargs; take the "
                "file as published"
            )
    return row


def _arguments(arguments: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments that are set: Parquet has all of them in each row."""
    return {name: value for name, value in (arguments or {}).items() if value}


def _missing(items: Sequence[Item]) -> str:
    """Return what the checks of the items lack on this machine, "" if nothing."""
    for item in items:
        for instruction in item.row["instruction_id_list"]:
            if missing := missing_package(instruction):
                return f"the check {instruction} {missing}"
    return ""


def _followed(item: Item, forms: Sequence[str]) -> Verdict:
    """Return for each instruction of an item whether any of the forms of the response follows it."""
    pairs = zip(item.row["instruction_id_list"], item.row["kwargs"], strict=True)
    return tuple(
        any(follows(instruction, _arguments(arguments), form) for form in forms)
        for instruction, arguments in pairs
    )


def _metrics(answer: Callable[[str], str], where: str) -> tuple[Metric, ...]:
    """Return the four metrics on the part of a response that `answer` returns."""

    def strict(item: Item, text: str) -> Verdict:
        return _followed(item, [answer(text)])

    def loose(item: Item, text: str) -> Verdict:
        return _followed(item, loosened(answer(text)))

    text = f"25 checks on {where}"
    loosely = f"{text} or a loosened form of it"
    return (
        Metric("prompt_level_strict_acc", lambda *pair: (all(strict(*pair)),), f"all of the item's {text}"),
        Metric("inst_level_strict_acc", strict, text, pooled=True),
        Metric("prompt_level_loose_acc", lambda *pair: (all(loose(*pair)),), f"all of the item's {loosely}"),
        Metric("inst_level_loose_acc", loose, loosely, pooled=True),
    )


IFEVAL = Suite(
    "ifeval",
    "IFEval",
    Source(
        "Instruction-Following Evaluation for Large Language Models",
        "https://arxiv.org/abs/2311.07911",
        "2023",
    ),
    "https://huggingface.co/datasets/google/IFEval",
    {"test": ("*input_data*", "*ifeval*", "*train*", "*test*")},
    ("key", "prompt", "instruction_id_list", "kwargs"),
    541,
    _read,
    (
        Protocol(
            "deepseek",
            R1_README,
            Prompt("{question}"),
            _metrics(after_thought, "what follows `</think>`"),
            reasoning(1),
            note="the reported metric is prompt_level_strict_acc",
        ),
        Protocol(
            "lm-eval",
            Source("lm-evaluation-harness 0.4.13, ifeval", f"{LM_EVAL}/ifeval/ifeval.yaml", "4.0"),
            Prompt("{question}", chat=False),
            _metrics(str, "the whole response"),
            greedy(1280),
        ),
        Protocol(
            "lighteval",
            Source("lighteval 0.13.0, ifeval", f"{LIGHTEVAL}/ifeval/main.py", "0.1"),
            Prompt("{question}"),
            _metrics(after_thought, "what follows `</think>`"),
            greedy(1280),
        ),
    ),
    _missing,
)
