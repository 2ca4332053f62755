"""The thought budget of one sequence: after so many reasoning tokens an open thought is closed."""

from __future__ import annotations

from ..text.reasoning_parser import CLOSE, OPEN, overlap
from ..text.tokenizer import Tokenizer

OVERTIME = 8  # tokens past the budget in which a half-written character or marker may be completed


class ThoughtBudget:
    """Counts the tokens of a thought and closes one that exceeds its budget.

    `ThoughtBudget(tokenizer, 512, opened=True)` is for a prompt that ends inside a thought. A completion that
    opens its thought itself is counted from there; one that begins with anything else is never checked again.
    """

    def __init__(self, tokenizer: Tokenizer, budget: int, opened: bool):
        self.tokenizer = tokenizer
        self.budget = budget
        self.inside = opened
        self.limit = budget if opened else 1  # tokens of the completion at which the thought is too long
        self.check_at: int | None = self.limit  # tokens of the completion at the next check, None for no more

    def forced(self, tokens: list[int]) -> list[int]:
        """The tokens of the closing marker once the thought in `tokens` is too long, else none."""
        while self.check_at is not None and len(tokens) >= self.check_at:
            text = self.tokenizer.decode(tokens)
            if not self.inside:
                self._find_opening(text, len(tokens))
            elif CLOSE in text:
                self.check_at = None
            elif _is_half_written(text) and len(tokens) < self.limit + OVERTIME:
                self.check_at += 1
            else:
                self.check_at = None
                return self.tokenizer.encode(CLOSE)
        return []

    def _find_opening(self, text: str, length: int) -> None:
        """Start to count at an opening marker; check again after the next token if it is only half
        written."""
        begin = text.lstrip()
        if begin.startswith(OPEN):
            self.inside = True
            self.limit = length + self.budget
            self.check_at = self.limit
        elif OPEN.startswith(begin):
            self.check_at += 1
        else:
            self.check_at = None


def _is_half_written(text: str) -> bool:
    """True if `text` ends inside a character of several bytes, or inside a closing marker."""
    return text.endswith("\ufffd") or bool(overlap(text, CLOSE))
