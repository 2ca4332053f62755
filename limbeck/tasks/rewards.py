"""Rewards: the parts of a score (accuracy, format, language), and their weighted sum.

Learned parts, of a judge or a reward model, are added in train/learned_rewards.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ..text.prompt_format import PromptFormat, template_fault
from ..text.reasoning_parser import split_thought
from ..types import Completion, LimbeckError, Problem, Score
from .answers import Verdict, extract

MAX_QUOTED = 80  # characters of an answer in a reason
FAILURES = (Verdict.UNPARSED, Verdict.TIMEOUT, Verdict.ERROR)

# Chinese characters one by one; then whole words of Latin letters, and of any other script.
_WORD = re.compile(
    r"(?P<chinese>[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
    r"|(?P<latin>[A-Za-z\u00c0-\u024f]+(?:['’][A-Za-z]+)*)"
    r"|(?P<other>[^\W\d_A-Za-z\u00c0-\u024f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+)"
)
_NO_WORD = re.compile(r"\\[A-Za-z]+|</?[A-Za-z]+>")

# DeepSeek-R1 counts these words as reflection (arXiv 2501.12948v2, C.2); the Chinese ones are ours.
# 等 is "wait", but 等于, 等式 and 等号 are "equals", "equation" and "equals sign".
_REFLECTION = re.compile(
    r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check|no)\b"
    r"|等等|等(?![于式号价])|不对|错|检查|验证|但",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[\n!?;。！？；]+|\.(?!\d)")


def weighted_sum(score: Score, weights: Mapping[str, float]) -> float:
    """The reward of a completion: the sum of its score's parts, each times its weight; an absent part counts
    0, and so does a score whose problem is skipped."""
    if score.skipped:
        return 0.0
    return float(sum(weight * score.parts.get(part, 0.0) for part, weight in weights.items()))


def grade(problem: Problem, completion: Completion, style: str, compare: Callable[[str], Verdict]) -> Score:
    """Return the score of a completion, with the parts accuracy, format and language. `style` is how the
    answer is marked (see `answers.extract`), and `compare` returns the verdict on the extracted answer.

    A completion without a marked thought counts as a thought as a whole. The part `language` is absent, and
    so earns nothing, if the thought has no words. A completion that ran out of tokens is never correct.
    """
    text = completion.text
    thought = split_thought(text).thought or text
    parts: dict[str, float] = {}
    reasons: dict[str, str] = {}
    verdict = None
    extraction = extract(text, style)
    if not completion.stopped:
        reasons["accuracy"] = "ran out of tokens"
    elif extraction.answer is None:
        reasons["accuracy"] = extraction.reason
    else:
        verdict = compare(extraction.answer)
        if verdict is not Verdict.CORRECT:
            answer = extraction.answer[:MAX_QUOTED]
            reasons["accuracy"] = f"{verdict.value}: answer {answer}, gold {problem.answer}"
    parts["accuracy"] = float(verdict is Verdict.CORRECT)
    parts["format"], reason = format_score(text, style)
    if reason:
        reasons["format"] = reason
    consistency = language_consistency(thought, problem.language)
    if consistency is not None:
        parts["language"] = consistency
    if consistency == 0:
        reasons["language"] = f"no word of {problem.language}"
    return Score(parts, reasons, _statistics(thought, verdict), extraction.answer or "")


def _statistics(thought: str, verdict: Verdict | None) -> dict[str, float]:
    """Return metrics that earn no reward: counts of reflections and repeats in the thought, and 1.0 or 0.0
    for each failed verdict, so that the mean over completions is the verifier's failure rate."""
    statistics = {
        "reflections": float(reflections(thought)),
        "repeats": float(repeats(thought)),
    }
    for failure in FAILURES:
        statistics[failure.value] = float(verdict is failure)
    return statistics


def fill_template(template: str, question: str, where: str) -> str:
    """Return the user message: `template` with the question in place of `{problem}`. Other braces, as in
    `\\boxed{}`, are left unchanged.

    Raises LimbeckError for a template without `{problem}` or with another placeholder; the message names
    `where`, a key of the recipe.
    """
    fault = template_fault(template)
    if fault:
        raise LimbeckError(f"{where}.template {fault}")
    return PromptFormat(template=template).fill(question)


def language_consistency(thought: str, language: str) -> float | None:
    """Return the share of words that are in the target language, in [0, 1] (DeepSeek-R1, arXiv 2501.12948v2,
    eq. 7), or None if the text has no words.

    For `zh` each Chinese character is a word of the language; for every other language, each word of Latin
    letters. Digits, operators, LaTeX commands and tags do not count as words.

    >>> language_consistency("先算 3+4，then 7", "zh")
    0.6666666666666666
    """
    kinds = [match.lastgroup for match in _WORD.finditer(_NO_WORD.sub(" ", thought))]
    if not kinds:
        return None
    target = "chinese" if language == "zh" else "latin"
    return kinds.count(target) / len(kinds)


def format_score(text: str, style: str) -> tuple[float, str]:
    """Return (1, "") if the completion has the required format, else 0 and the reason: the format reward of
    DeepSeek-R1 (arXiv 2501.12948v2, 2.2).

    The style `tags` requires a thought, then one answer block and no other text; `boxed` a thought, then text
    with one box; `final`, for small models without tags, a last line that ends in a number.
    """
    extraction = extract(text, style)
    if extraction.answer is None:
        return 0.0, extraction.reason
    if style == "final":
        return 1.0, ""
    thought = split_thought(text)
    if not thought.wellformed:
        return 0.0, "the thought is not in one pair of think tags"
    if style == "tags" and not re.fullmatch(r"\s*<answer>.*</answer>\s*", thought.answer, re.DOTALL):
        return 0.0, "there is text around the answer block"
    return 1.0, ""


def repeats(text: str) -> int:
    """Return the number of sentences that repeat an earlier sentence word for word, which is a sign of a
    thought that makes no progress.

    >>> repeats("Try 5. No. Try 6. No. Try 5.")
    2
    """
    sentences = [" ".join(part.split()).lower() for part in _SENTENCE_END.split(text)]
    sentences = [sentence for sentence in sentences if sentence]
    return len(sentences) - len(set(sentences))


def reflections(text: str) -> int:
    """Return the number of words that indicate reflection, such as wait, check, 等 and 不对 (DeepSeek-R1 v2,
    C.2)."""
    return len(_REFLECTION.findall(text))
