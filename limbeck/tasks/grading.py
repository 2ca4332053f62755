"""Scores of completions from the parts of a reward, and prompts from instructions: shared by all tasks with
text answers."""

from __future__ import annotations

from collections.abc import Callable

from ..text.reasoning_parser import split_thought
from ..types import Completion, LimbeckError, Problem, Score
from . import reward_parts
from .answers import Verdict, extract

MAX_QUOTED = 80  # characters of an answer in a reason
FAILURES = (Verdict.UNPARSED, Verdict.TIMEOUT, Verdict.ERROR)


def grade(problem: Problem, completion: Completion, style: str, compare: Callable[[str], Verdict]) -> Score:
    """Score a completion by the parts accuracy, format and language; `compare` judges its extracted answer.

    Without a marked thought the whole text is one. `language` is absent, and so earns nothing, where the
    thought has no words. A completion that ran out of tokens is never correct.
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
    """Metrics that earn no reward; the means of the verdicts are the verifier's failure rates."""
    statistics = {
        "reflections": float(reward_parts.reflections(thought)),
        "repeats": float(reward_parts.repeats(thought)),
    }
    for failure in FAILURES:
        statistics[failure.value] = float(verdict is failure)
    return statistics


def fill_instruction(instruction: str, question: str, where: str) -> str:
    """The prompt: `instruction` with the question for `{problem}`; other braces (`\\boxed{}`) are left as
    they are.

    Raises LimbeckError, which names the recipe's key `where`, if there is no `{problem}`.
    """
    if "{problem}" not in instruction:
        raise LimbeckError(f"{where}: instruction has no {{problem}}; put it where the question belongs")
    return instruction.replace("{problem}", question)
