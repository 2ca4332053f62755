"""Taking the answer out of a completion, and comparing it with the gold one. Never raises, never hangs.

A lenient verifier is what a policy learns to please, so this one is strict: one answer in one place, as
finished as the gold (`76+60` is no answer to a question whose gold is 136), and of the gold's shape. Three
layers, cheapest first: the same normalised string, exact rationals, and math-verify in a killable child.
"""

from __future__ import annotations

import re
import threading
from enum import Enum
from typing import NamedTuple

from .numerals import DIGITS, PLAIN, UNITS, Quantity, normalise, quantity
from .referee import REFEREE

LONGEST = 512  # characters of an answer
_REMEMBERED = 1 << 16  # verdicts of the child


class Extraction(NamedTuple):
    """`Extraction("42", "")`, or `Extraction(None, "no \\boxed{}")` when there is no single answer."""

    answer: str | None
    reason: str


class Verdict(Enum):
    """Only `CORRECT` pays; the rates of the last three are watched."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    TIMEOUT = "timeout"
    ERROR = "error"


# ---------------------------------------------------------------- taking it out


def extract(text: str, style: str) -> Extraction:
    """The one answer of a completion: in `tags`, `boxed`, or the `final` number of the last line.

    `tags` and `boxed` look only behind the only `</think>`; `final` is the lenient style for small models.
    """
    thoughts = text.count("</think>")
    if thoughts > 1:
        return Extraction(None, f"{thoughts} </think> tags")
    if style == "tags" and not thoughts:
        return Extraction(None, "no </think> tag")
    answer = text.rpartition("</think>")[2]
    found = {"tags": _tagged, "boxed": _boxed, "final": _final}[style](answer)
    if found.answer is None:
        return found
    if not found.answer.strip():
        return Extraction(None, "the answer is empty")
    if len(found.answer) > LONGEST:
        return Extraction(None, f"the answer is longer than {LONGEST} characters")
    return Extraction(found.answer.strip(), "")


def _tagged(text: str) -> Extraction:
    opened, closed = text.count("<answer>"), text.count("</answer>")
    if opened != 1 or closed != 1:
        return Extraction(
            None, f"{opened} <answer> and {closed} </answer> tags after the thought, not one of each"
        )
    before, _, rest = text.partition("<answer>")
    if "</answer>" in before:
        return Extraction(None, "</answer> comes before <answer>")
    return Extraction(rest.partition("</answer>")[0], "")


def _boxed(text: str) -> Extraction:
    boxes = [match.end() for match in re.finditer(r"\\boxed\b", text)]
    if len(boxes) != 1:
        return Extraction(None, f"{len(boxes) or 'no'} \\boxed{{}} after the thought")
    inside = _braced(text, boxes[0])
    return Extraction(inside, "" if inside is not None else "the braces of \\boxed{} do not match")


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and its partner."""
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
_UNADORNED = re.compile(r"(?:[\s$]|\*\*)+$")
# what comes before the number: "is -4" is negative, but "9 -4", "x-4" and "x - 4" leave something to do
_MINUS = re.compile(r"[0-9)]\s*-\s*$|\w(?:-|\s+-\s+)$")
_UNFINISHED = re.compile(r"[-+*/^×÷]$|\\(?:times|cdot|div)$")
_SEVERAL = re.compile(r"[0-9]\D{0,12}(?:\bor\b|或)\D{0,12}$|[0-9]\s*[,、;]$")


def _final(text: str) -> Extraction:
    line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    # an answer's line is short; a long one would only feed the regular expression
    match = _LAST_NUMBER.fullmatch(line.translate(PLAIN)) if len(line) <= LONGEST else None
    if not match:
        return Extraction(None, "the last line does not end in a number")
    before, sign = _UNADORNED.sub("", match["before"]), ""
    if before.endswith("-") and not _MINUS.search(match["before"].rstrip("$*")):
        before, sign = _UNADORNED.sub("", before[:-1]), "-"
    if _UNFINISHED.search(before):
        return Extraction(None, "the last line ends in a sum that is not worked out")
    if _SEVERAL.search(before):
        return Extraction(None, "the last line offers several answers")
    return Extraction(f"{sign}{match['number']}{'%' if match['percent'] else ''}", "")


# ---------------------------------------------------------------- comparing


def gold(raw: str) -> str | None:
    """The gold answer in a data set's field: GSM8K's `#### 18`, a `\\boxed{}`, or the answer itself.

    None where nothing can be judged: prose, nothing at all, braces that do not match.
    """
    if "####" in raw:
        raw = raw.rpartition("####")[2]
    elif "\\boxed" in raw:
        raw = _braced(raw, raw.rindex("\\boxed") + len("\\boxed")) or ""
    answer = raw.strip()
    prose = len(re.findall(r"(?<!\\)\b[^\W\d_]{2,}", answer)) > 5 or len(answer.splitlines()) > 1
    matched = answer.count("{") == answer.count("}")
    return answer if answer and matched and not prose and len(answer) <= LONGEST else None


_HOPELESS = re.compile(
    r"\^[\s{(]*[-+]?[\w.]+[\s})]*\^|\^\s*\{[^{}]*\^"  # a tower of exponents
    r"|\^[\s{(]*[-+]?[0-9]{3,}|\*\*|![\s)}]*!|[0-9]{4,}[\s)}]*!|\^[^+\-,]{0,8}!"
    r"|[0-9]{80,}|\\(?:sum|prod|int|begin)\b.*\\(?:sum|prod|int)\b"
)


def hopeless(text: str) -> bool:
    """Whether no judge should be asked: too long, too deep, or a number too large to write down."""
    if len(text) > LONGEST or _HOPELESS.search(text):
        return True
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest > 12


def judge(gold: str, answer: str, deadline: float = 2.0) -> Verdict:
    """Whether two answers are the same; `deadline` is the child's processor time in seconds."""
    if max(len(gold), len(answer)) > LONGEST:
        return Verdict.UNPARSED
    gold, answer = normalise(gold), normalise(answer)
    if not gold or not answer:
        return Verdict.UNPARSED
    if gold == answer or (_word(gold) and gold.lower() == answer.lower()):
        return Verdict.CORRECT
    if hopeless(answer) or hopeless(gold):
        return Verdict.UNPARSED
    if ("=" in gold) != ("=" in answer):
        gold, answer = _assigned(gold), _assigned(answer)
    wanted, given = quantity(gold), quantity(answer)
    if wanted:
        return Verdict.CORRECT if given and _equal(wanted, given) else Verdict.WRONG
    rounded = given and given.value.denominator > 1 and "." in answer
    if rounded or _word(gold) or _shape(gold) != _shape(answer):
        return Verdict.WRONG
    return _prove(gold, answer, deadline)


def _word(text: str) -> bool:
    return len(text) > 1 and not re.search(r"[0-9\\^=+*/|]", text)


def _assigned(text: str) -> str:
    """`5` of `x=5`: a single letter may stand before the answer, as in `41=42` nothing else may."""
    return re.sub(r"^[A-Za-z]=(?=[^=]+$)", "", text)


def _equal(gold: Quantity, answer: Quantity) -> bool:
    """Equal values, and nothing that would make the answer another one: percent, units, work left to do."""
    if gold.value != answer.value or gold.percent != answer.percent:
        return False
    if answer.divided and gold.value.denominator == 1 and not gold.divided:
        return False
    return not answer.unit or answer.unit == gold.unit or (not gold.unit and answer.unit in UNITS)


_ON_INFINITY = re.compile(r"\\infty ?[-+*/^0-9]|[0-9*/)] ?[-+]? ?\\infty")
_RELATION = re.compile(r"[=<>≈≤≥≠]|\\(?:le|ge|leq|geq|ne|neq|approx|sim|pm)\b")


def _shape(text: str) -> tuple:
    """What two equal answers share and math-verify looks past: letters, brackets, relations, list items.

    Without it x/x would be 1, x^2 would be |x|^2, and [1,2] as good as (1,2).
    """
    letters = frozenset(re.findall(r"[^\W\d_]", re.sub(r"\\[A-Za-z]+", " ", text)))
    commas = len(re.findall(r"[,;]", text))
    brackets = (text[0], text[-1]) if commas and text[0] in "([" else None
    bars = len(re.findall(r"\||\\[lr]?vert\b", text))
    infinite = _ON_INFINITY.search(text) is not None
    return letters, commas, brackets, bars, infinite, len(_RELATION.findall(text)), "%" in text


_verdicts: dict[tuple[str, str], Verdict] = {}
_verdicts_lock = threading.Lock()


def _prove(gold: str, answer: str, deadline: float) -> Verdict:
    """Ask the child, once for each pair; an error may pass, so it is not remembered."""
    known = _verdicts.get((gold, answer))
    if known:
        return known
    verdict = Verdict(REFEREE.ask("mathematics", gold, answer=answer, deadline=deadline))
    if verdict is not Verdict.ERROR:
        with _verdicts_lock:
            if len(_verdicts) >= _REMEMBERED:
                _verdicts.clear()
            _verdicts[gold, answer] = verdict
    return verdict
