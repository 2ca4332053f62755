"""The scoring of completions and the building of prompts, shared by all tasks whose answers are texts."""

from __future__ import annotations

from collections.abc import Callable

from ..text.reasoning_parser import split_thought
from ..types import Completion, LimbeckError, Problem, Score
from . import reward_parts
from .answers import Verdict, extract

MAX_QUOTED = 80  # characters of an answer in a reason
FAILURES = (Verdict.UNPARSED, Verdict.TIMEOUT, Verdict.ERROR)


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
    parts["format"], reason = reward_parts.format_score(text, style)
    if reason:
        reasons["format"] = reason
    consistency = reward_parts.language_consistency(thought, problem.language)
    if consistency is not None:
        parts["language"] = consistency
    if consistency == 0:
        reasons["language"] = f"no word of {problem.language}"
    return Score(parts, reasons, _statistics(thought, verdict), extraction.answer or "")


def _statistics(thought: str, verdict: Verdict | None) -> dict[str, float]:
    """Return metrics that earn no reward: counts of reflections and repeats in the thought, and 1.0 or 0.0
    for each failed verdict, so that the mean over completions is the verifier's failure rate."""
    statistics = {
        "reflections": float(reward_parts.reflections(thought)),
        "repeats": float(reward_parts.repeats(thought)),
    }
    for failure in FAILURES:
        statistics[failure.value] = float(verdict is failure)
    return statistics


def fill_instruction(instruction: str, question: str, where: str) -> str:
    """Return the prompt: `instruction` with the question in place of `{problem}`. Other braces, as in
    `\\boxed{}`, are left unchanged.

    Raises LimbeckError if the instruction has no `{problem}`; the message names `where`, a key of the recipe.
    """
    if "{problem}" not in instruction:
        raise LimbeckError(f"{where}: instruction has no {{problem}}; put it where the question belongs")
    return instruction.replace("{problem}", question)
