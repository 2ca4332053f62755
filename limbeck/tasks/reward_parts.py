"""Parts of a reward that need no gold (reference) answer, computed from the text and its length alone."""

from __future__ import annotations

import re

from ..text.reasoning_parser import split_thought
from .answers import extract

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


def overlong(length: int, limit: int, margin: int) -> float:
    """Return the soft overlong punishment, in [-1, 0] (DAPO, arXiv 2503.14476, eq. 13). `length`, `limit` and
    `margin` are in tokens.

    It is 0 up to a length of `limit - margin`, then falls linearly to -1 at `limit`.

    >>> overlong(90, limit=100, margin=20)
    -0.5
    """
    if not margin:
        return -float(length > limit)
    return min(0.0, max(-1.0, (limit - margin - length) / margin))


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
