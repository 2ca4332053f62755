"""The thought budget of one sequence: a thought, the reasoning between `<think>` and `</think>`, that is
still open after a given number of tokens is closed."""

from __future__ import annotations

from ..text.reasoning_parser import CLOSE, OPEN, overlap
from ..text.tokenizer import Tokenizer

OVERTIME = 8  # tokens past the budget in which a half-written character or marker may be completed


class ThoughtBudget:
    """Counts the tokens of a thought, and closes the thought once it exceeds `budget` tokens.

    `opened` is True if the prompt ends inside a thought, as in `ThoughtBudget(tokenizer, 512, opened=True)`.
    If the completion itself opens a thought, tokens are counted from there. If the completion begins with any
    other text, it has no thought and is not checked further.
    """

    def __init__(self, tokenizer: Tokenizer, budget: int, opened: bool):
        self.tokenizer = tokenizer
        self.budget = budget
        self.inside = opened
        self.limit = budget if opened else 1  # tokens of the completion at which the thought is too long
        self.check_at: int | None = self.limit  # tokens of the completion at the next check, None for no more

    def forced(self, tokens: list[int]) -> list[int]:
        """Return the tokens of the closing marker if the completion `tokens` ends in a thought that exceeds
        the budget, else an empty list."""
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
        """Look for the opening marker at the beginning of `text`, the first `length` tokens of the
        completion. Start to count if it is there; look again after the next token if `text` may be its
        beginning."""
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
    """Return True if `text` ends inside a character of several bytes or inside a closing marker."""
    return text.endswith("\ufffd") or bool(overlap(text, CLOSE))
