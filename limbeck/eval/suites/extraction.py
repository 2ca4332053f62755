"""Extraction of answers from responses, as published harnesses do it: regular expressions, boxes, letters.

These are more lenient than the package's own verifier (`tasks/answers.py`): a score is comparable to a
published one only if it was extracted in the same way."""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from .suite import LETTERS

INVALID = "[invalid]"  # what lm-eval's filters return if they find nothing


def find_match(pattern: str, text: str, which: int = 0) -> str:
    """Return the match with the index `which` of a regular expression, its first group that is not empty if
    it has groups; `INVALID` if there is none (lm-eval's filter `regex`)."""
    matches = re.findall(pattern, text)
    if not matches:
        return INVALID
    match = matches[which]
    if isinstance(match, tuple):
        match = next((group for group in match if group), INVALID)
    return match.strip()


def find_choice(pattern: str, text: str, choices: Sequence[str]) -> str:
    """Return the last option that a response names, as `(B)` (lm-eval's filter `multi_choice_regex` with the
    last match, upper and lower case and punctuation ignored): a match of `pattern`, else the text of an
    option, else a letter after a colon; `INVALID` if there is none."""
    matches = re.findall(pattern, text)
    if matches and matches[-1].strip():
        return matches[-1].strip()
    letters = LETTERS[: len(choices)]
    by_text = {_plain(choice.strip()): f"({letter})" for letter, choice in zip(letters, choices, strict=True)}
    longest_first = sorted(by_text, key=len, reverse=True)
    matches = re.findall("|".join(map(re.escape, longest_first)), _plain(text))
    if matches and matches[-1].strip():
        named = matches[-1].strip()
        return by_text.get(named, named)
    matches = re.findall(rf":[\s]*({'|'.join(letters)})", text)
    return f"({matches[-1]})" if matches else INVALID


def last_box(text: str) -> str | None:
    """Return the content of the last `\\boxed{}`, or what stands between the last `\\boxed ` and the next
    dollar sign; None if there is no box or its braces are not closed (lm-eval, `tasks/aime/utils.py`)."""
    if r"\boxed " in text:
        return text.split(r"\boxed ")[-1].split("$")[0]
    start = text.rfind(r"\boxed")
    end = _closing_brace(text, start) if start >= 0 else None
    boxed = text[start:end] if end else ""
    return boxed[len(r"\boxed{") : -1] if boxed.startswith(r"\boxed{") else None


def keep_last_box(text: str) -> str:
    r"""Return the text without `\boxed` before its last box, except where boxes are joined by a comma, `and`
    or `or`. So math-verify reads the last answer, as it did in the version that lighteval 0.13 has."""
    starts = [box.start() for box in re.finditer(r"\\boxed", text)]
    kept = len(starts) - 1
    while kept > 0:
        end = _closing_brace(text, starts[kept - 1])
        if end is None or not _JOINED.fullmatch(text[end : starts[kept]]):
            break
        kept -= 1
    if kept < 1:
        return text
    return text[: starts[kept]].replace(r"\boxed", "") + text[starts[kept] :]


_JOINED = re.compile(r"\s*\$?\s*(?:,|,?\s*and|,?\s*or)\s*\$?\s*")


def _closing_brace(text: str, start: int) -> int | None:
    """Return the position after the brace that closes the first one from `start` on, None if none does."""
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.end()
    return None


def between_dollars(text: str) -> str:
    """Return what stands between the first and the last dollar sign; the text if there are not two."""
    first = text.find("$")
    last = text.rfind("$")
    return text[first + 1 : last] if first < last else text


@lru_cache(maxsize=32)
def _letter_patterns(letters: str) -> list[re.Pattern[str]]:
    """Return the patterns that find a letter, in the order in which they are tried (lighteval 0.13,
    `lazy_indices_regex`, for English)."""
    letter = "(?P<letter>" + "|".join(rf"{one}|\({one}\)" for one in letters) + ")"
    end = r"(?:\*\*)?(?:[.,]|\s?:| |$)"
    word = rf"(?:^| )(?:\*\*)?{letter}{end}"
    patterns = [
        rf"(?i:final answer is):?\s*{letter}\.?\s?I hope",
        rf"(?i:final answer.{{0,100}}?)\s+is:?\s*{letter}",
        rf"(?i:answer)\s?:.{{0,50}}?{word}",
        rf"(?i:answer).{{0,50}}?{word}",
        rf"^(?:\*\*)?{letter}{end}",
        rf"\n(?:\*\*)?{letter}{end}",
        word,
        letter,
    ]
    return [re.compile(pattern) for pattern in patterns]


def find_letter(text: str, letters: str) -> str:
    """Return the letter that a response chooses: the last match of the first pattern that matches
    (lighteval 0.13, `gpqa_instruct_metric`); "" if there is none."""
    for pattern in _letter_patterns(letters):
        matches = list(pattern.finditer(text))
        if matches:
            return matches[-1]["letter"].strip("()")
    return ""


def exact_match(
    gold: str, answer: str, ignored: Sequence[str] = (), punctuation: bool = False, case: bool = True
) -> bool:
    """Return True if two texts are equal once all that matches the regular expressions `ignored` is removed,
    and with `punctuation` also the punctuation (lm-eval's metric `exact_match`). Case is ignored if `case`.
    """
    for pattern in ignored:
        gold = re.sub(pattern, "", gold)
        answer = re.sub(pattern, "", answer)
    if case:
        gold = gold.lower()
        answer = answer.lower()
    if punctuation:
        table = str.maketrans("", "", string.punctuation)
        gold = gold.translate(table)
        answer = answer.translate(table)
    return gold == answer


@lru_cache(maxsize=1)
def _punctuation() -> dict[int, None]:
    """Return the translation table that deletes all punctuation of Unicode."""
    every = range(sys.maxunicode)
    return dict.fromkeys(code for code in every if unicodedata.category(chr(code)).startswith("P"))


def _plain(text: str) -> str:
    """Return the text in lower case without punctuation."""
    return text.lower().translate(_punctuation())
