"""Worked steps: responses to questions that ask for one sum, with every intermediate result written out.

A question is read only if its sum of whole numbers is unmistakable: nothing else in the question may have a
digit, so that word problems, products, and sums with brackets give no steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .answers import mark_answer
from .numerals import PLAIN

_TERM = r"-?[0-9]{1,18}"
_SUM = re.compile(rf"(?<![A-Za-z_0-9.,]){_TERM}(?:\s*[-+]\s*{_TERM})+(?![A-Za-z_0-9]|[.,][0-9])")
_OPERATION = re.compile(rf"\s*([-+])\s*({_TERM})")
_ENDS_BEFORE = frozenset(":.,;?!=\"'`$")  # a sum may follow these, letters, or nothing
_BEGINS_AFTER = frozenset(":.,;?=\"'`$")  # and be followed by these, letters, or nothing


def work_out(question: str) -> tuple[list[str], int] | None:
    """Return the steps of the only sum of a question, from left to right, and its value. Return None if the
    question has no such sum of two or more terms, or any number beside it.

    >>> work_out("What is 4 - 8 + 9?")
    (['4 - 8 = -4.', '-4 + 9 = 5.'], 5)
    """
    text = question.translate(PLAIN)
    found = _SUM.search(text)
    if not found or not _stands_alone(text[: found.start()].rstrip(), text[found.end() :].lstrip()):
        return None
    first = re.match(_TERM, found.group())
    value = int(first.group())
    steps = []
    for sign, term in _OPERATION.findall(found.group(), first.end()):
        result = value + int(term) if sign == "+" else value - int(term)
        steps.append(f"{value} {sign} {int(term)} = {result}.")
        value = result
    return steps, value


def _stands_alone(before: str, after: str) -> bool:
    """Return True if a sum between these texts is no part of a larger expression, and the only one."""
    if re.search(r"[0-9]", before + after):
        return False
    end = before[-1:]
    begin = after[:1]
    return (not end or end.isalpha() or end in _ENDS_BEFORE) and (
        not begin or begin.isalpha() or begin in _BEGINS_AFTER
    )


def write_response(question: str, style: str) -> str | None:
    """Return a response to a question: the steps of its sum as the thought, and its value as the answer,
    marked in the `style` that `answers.extract` reads. Return None if `work_out` finds no sum.

    >>> write_response("What is 4 - 8 + 9?", "final")
    '<think> First 4 - 8 = -4. Then -4 + 9 = 5. </think> The answer is 5.'
    """
    worked = work_out(question)
    if worked is None:
        return None
    steps, value = worked
    return join_steps(steps, value, style)


def join_steps(steps: Iterable[str], value: int, style: str) -> str:
    """Return a response whose thought has the steps, in words as well, so that its language can be judged."""
    thought = " Then ".join(steps)
    return f"<think> First {thought} </think> {mark_answer(str(value), style)}"
