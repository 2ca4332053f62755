"""Extraction of the answer from a completion, and comparison with the gold (reference) answer. For any text,
both end within a time limit and raise nothing.

A policy learns to exploit a lenient verifier, so this one is strict: a completion must have one answer in one
place, as finished as the gold answer (`76+60` is not accepted if the gold answer is 136), and of the same
form. Three comparisons are tried, cheapest first: equality of the normalised strings, equality as exact
rational numbers, and math-verify in a sandbox.
"""

from __future__ import annotations

import re
import threading
from enum import Enum
from typing import NamedTuple

from .numerals import DIGITS, PLAIN, UNITS, Quantity, normalise, quantity
from .sandbox import SANDBOX

MAX_ANSWER = 512  # characters of an answer
MAX_DEPTH = 12  # brackets inside one another
MAX_PROSE = 5  # words; a gold answer with more of them is prose
CACHED_VERDICTS = 1 << 16  # verdicts of the sandbox


class Extraction(NamedTuple):
    """The answer that was extracted from a completion, as in `Extraction("42", "")`. If there is not exactly
    one, `answer` is None and `reason` states why: `Extraction(None, "no \\boxed{}")`."""

    answer: str | None
    reason: str


class Verdict(Enum):
    """The result of comparing an answer with the gold answer. Only `CORRECT` is rewarded. The rates of the
    last three are reported as failures of the verifier: `UNPARSED` (the text cannot be read as an answer),
    `TIMEOUT` and `ERROR`."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    TIMEOUT = "timeout"
    ERROR = "error"


# ---------------------------------------------------------------- extraction


def extract(text: str, style: str) -> Extraction:
    """Return the only answer of a completion. `style` selects where it stands: `tags` (between `<answer>`
    tags), `boxed` (in `\\boxed{}`) or `final` (the number at the end of the last line).

    An answer is searched only after `</think>`, and there is none if the text has several. `tags` requires a
    `</think>`; `boxed` and `final` read the whole text if there is none. `final` is the lenient style, for
    small models.
    """
    thoughts = text.count("</think>")
    if thoughts > 1:
        return Extraction(None, f"{thoughts} </think> tags")
    if style == "tags" and not thoughts:
        return Extraction(None, "no </think> tag")
    _, _, response = text.rpartition("</think>")
    extraction = STYLES[style](response)
    if extraction.answer is None:
        return extraction
    answer = extraction.answer.strip()
    if not answer:
        return Extraction(None, "the answer is empty")
    if len(extraction.answer) > MAX_ANSWER:
        return Extraction(None, f"the answer is longer than {MAX_ANSWER} characters")
    return Extraction(answer, "")


def _extract_tagged(text: str) -> Extraction:
    opens = text.count("<answer>")
    closes = text.count("</answer>")
    if opens != 1 or closes != 1:
        return Extraction(
            None, f"{opens} <answer> and {closes} </answer> tags after the thought, not one of each"
        )
    before, _, rest = text.partition("<answer>")
    if "</answer>" in before:
        return Extraction(None, "</answer> comes before <answer>")
    answer, _, _ = rest.partition("</answer>")
    return Extraction(answer, "")


def _extract_boxed(text: str) -> Extraction:
    boxes = [match.end() for match in re.finditer(r"\\boxed\b", text)]
    if len(boxes) != 1:
        return Extraction(None, f"{len(boxes) or 'no'} \\boxed{{}} after the thought")
    answer = _braced(text, boxes[0])
    return Extraction(answer, "" if answer is not None else "the braces of \\boxed{} do not match")


def _braced(text: str, start: int) -> str | None:
    """Return the text between the opening brace at or after `start` (only white space may precede it) and the
    matching closing brace, or None if there is no such pair."""
    opening = re.compile(r"\s*\{").match(text, start)
    if not opening:
        return None
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[opening.end() : brace.start()]
    return None


_LAST_NUMBER = re.compile(
    rf"(?P<before>.*?)(?P<number>(?<![0-9.,/])(?:{DIGITS})(?:/[0-9]+)?)"
    r"(?P<percent>\s?\\?%)?(?:\s?[^\W\d_]{1,20})?[\s.$*]*"  # a unit, a full stop
)
_DECORATION = re.compile(r"(?:[\s$]|\*\*)+$")
# Before the number: "is -4" is negative, but "9 -4", "x-4" and "x - 4" are subtractions.
_SUBTRACTION = re.compile(r"[0-9)]\s*-\s*$|\w(?:-|\s+-\s+)$")
_UNFINISHED = re.compile(r"[-+*/^×÷]$|\\(?:times|cdot|div)$")
_SEVERAL = re.compile(r"[0-9]\D{0,12}(?:\bor\b|或)\D{0,12}$|[0-9]\s*[,、;]$")


def _extract_final(text: str) -> Extraction:
    line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    match = None
    if (
        len(line) <= MAX_ANSWER
    ):  # an answer's line is short; a long one would only slow the regular expression
        match = _LAST_NUMBER.fullmatch(line.translate(PLAIN))
    if not match:
        return Extraction(None, "the last line does not end in a number")
    before = _DECORATION.sub("", match["before"])
    sign = ""
    if before.endswith("-") and not _SUBTRACTION.search(match["before"].rstrip("$*")):
        before = _DECORATION.sub("", before[:-1])
        sign = "-"
    if _UNFINISHED.search(before):
        return Extraction(None, "the last line ends in a sum that is not worked out")
    if _SEVERAL.search(before):
        return Extraction(None, "the last line offers several answers")
    percent = "%" if match["percent"] else ""
    return Extraction(f"{sign}{match['number']}{percent}", "")


STYLES = {"tags": _extract_tagged, "boxed": _extract_boxed, "final": _extract_final}


_MARKED = {
    "tags": "<answer> {} </answer>",
    "boxed": "The answer is \\boxed{{{}}}.",
    "final": "The answer is {}.",
}


def mark_answer(answer: str, style: str) -> str:
    """Return the text after a thought in which `extract` finds `answer`.

    >>> mark_answer("42", "boxed")
    'The answer is \\\\boxed{42}.'
    """
    return _MARKED[style].format(answer)


# ---------------------------------------------------------------- comparison


def parse_gold(raw: str) -> str | None:
    """Return the gold answer in the field `raw` of a data set's row: what follows the last `####` (GSM8K),
    the content of the last `\\boxed{}`, or the whole field.

    Return None if answers could not be compared with it: a field that is prose, empty, too long, or of
    several lines, or whose braces are unbalanced.
    """
    if "####" in raw:
        _, _, raw = raw.rpartition("####")
    elif "\\boxed" in raw:
        raw = _braced(raw, raw.rindex("\\boxed") + len("\\boxed")) or ""
    answer = raw.strip()
    if not answer or len(answer) > MAX_ANSWER or len(answer.splitlines()) > 1:
        return None
    if answer.count("{") != answer.count("}"):
        return None
    prose = re.findall(r"(?<!\\)\b[^\W\d_]{2,}", answer)
    return answer if len(prose) <= MAX_PROSE else None


_INTRACTABLE = re.compile(
    r"\^[\s{(]*[-+]?[\w.]+[\s})]*\^|\^\s*\{[^{}]*\^"  # a tower of exponents
    r"|\^[\s{(]*[-+]?[0-9]{3,}|\*\*|![\s)}]*!|[0-9]{4,}[\s)}]*!|\^[^+\-,]{0,8}!"
    r"|[0-9]{80,}|\\(?:sum|prod|int|begin)\b.*\\(?:sum|prod|int)\b"
)


def is_intractable(text: str) -> bool:
    """Return True if the text must not be passed to math-verify, because it is too long, has too deeply
    nested brackets, or stands for a number too large to compute."""
    if len(text) > MAX_ANSWER or _INTRACTABLE.search(text):
        return True
    depth = 0
    deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH


def judge(gold: str, answer: str, deadline: float = 2.0) -> Verdict:
    """Return the verdict on an answer, compared with the gold answer. `deadline` limits the sandbox's
    processor time, in seconds."""
    if max(len(gold), len(answer)) > MAX_ANSWER:
        return Verdict.UNPARSED
    gold = normalise(gold)
    answer = normalise(answer)
    if not gold or not answer:
        return Verdict.UNPARSED
    if gold == answer or (_is_word(gold) and gold.lower() == answer.lower()):
        return Verdict.CORRECT
    if is_intractable(answer) or is_intractable(gold):
        return Verdict.UNPARSED
    if ("=" in gold) != ("=" in answer):
        gold = _without_variable(gold)
        answer = _without_variable(answer)
    return _judge_value(gold, answer) or _judge_in_sandbox(gold, answer, deadline)


def _judge_value(gold: str, answer: str) -> Verdict | None:
    """Return the verdict on two different normalised texts if their numbers or their form decide it, or None
    if algebra is needed."""
    wanted = quantity(gold)
    given = quantity(answer)
    if wanted:
        return Verdict.CORRECT if given and _is_equal(wanted, given) else Verdict.WRONG
    if given and given.value.denominator > 1 and "." in answer:  # rounded
        return Verdict.WRONG
    if _is_word(gold) or _form(gold) != _form(answer):
        return Verdict.WRONG
    return None


def _is_word(text: str) -> bool:
    return len(text) > 1 and not re.search(r"[0-9\\^=+*/|]", text)


def _without_variable(text: str) -> str:
    """Return the text without a leading variable: `5` for `x=5`. Other equations, such as `41=42`, are
    unchanged."""
    return re.sub(r"^[A-Za-z]=(?=[^=]+$)", "", text)


def _is_equal(gold: Quantity, answer: Quantity) -> bool:
    """Return True if the two values are equal, both or neither have a percent sign, the units are compatible,
    and the answer is not an unfinished division where the gold answer is a whole number."""
    if gold.value != answer.value or gold.percent != answer.percent:
        return False
    if answer.divided and gold.value.denominator == 1 and not gold.divided:
        return False
    if not answer.unit or answer.unit == gold.unit:
        return True
    return not gold.unit and answer.unit in UNITS


_ON_INFINITY = re.compile(r"\\infty ?[-+*/^0-9]|[0-9*/)] ?[-+]? ?\\infty")
_RELATION = re.compile(r"[=<>≈≤≥≠]|\\(?:le|ge|leq|geq|ne|neq|approx|sim|pm)\b")


def _form(text: str) -> tuple:
    """Return the features that equal answers must share but math-verify ignores: letters, brackets, absolute
    bars, relations, and the number of list items.

    Without this check x/x would equal 1, x^2 would equal |x|^2, and [1,2] would equal (1,2).
    """
    letters = frozenset(re.findall(r"[^\W\d_]", re.sub(r"\\[A-Za-z]+", " ", text)))
    commas = len(re.findall(r"[,;]", text))
    brackets = (text[0], text[-1]) if commas and text[0] in "([" else None
    bars = len(re.findall(r"\||\\[lr]?vert\b", text))
    infinite = _ON_INFINITY.search(text) is not None
    relations = len(_RELATION.findall(text))
    return letters, commas, brackets, bars, infinite, relations, "%" in text


_verdicts: dict[tuple[str, str], Verdict] = {}
_verdicts_lock = threading.Lock()


def _judge_in_sandbox(gold: str, answer: str, deadline: float) -> Verdict:
    """Return math-verify's verdict, which is cached for each pair of gold answer and answer. `ERROR` is not
    cached, since its cause may be temporary."""
    cached = _verdicts.get((gold, answer))
    if cached:
        return cached
    verdict = Verdict(SANDBOX.ask("mathematics", gold, answer=answer, deadline=deadline))
    if verdict is not Verdict.ERROR:
        with _verdicts_lock:
            if len(_verdicts) >= CACHED_VERDICTS:
                _verdicts.clear()
            _verdicts[gold, answer] = verdict
    return verdict
