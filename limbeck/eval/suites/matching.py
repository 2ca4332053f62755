"""Comparison of mathematical answers as published harnesses do it: the string normalisation of Hendrycks et
al., and math-verify on whole responses."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...tasks.answers import Verdict
from ...tasks.sandbox import SANDBOX
from .extraction import keep_last_box, last_box

DEADLINE = 10.0  # seconds of processor time for one verdict; harnesses grant five to parse, five to compare
MAX_RESPONSE = 20_000  # characters at the end of a response that math-verify searches


@dataclass(frozen=True)
class MathVerify:
    """How math-verify extracts answers: which kinds of text it looks for in the gold answer and in the
    response, in order (`latex`, `expr`), the priority of `\\boxed{}` (0: first), and the decimals to which
    floats are rounded. With `last_box`, only the last box counts; its newer versions join boxes that stand
    close to each other."""

    gold: tuple[str, ...] = ("latex", "expr")
    answer: tuple[str, ...] = ("latex", "expr")
    boxed_priority: int = 50
    rounding: int = 6
    last_box: bool = False

    def is_correct(self, gold: str, response: str) -> bool:
        """Return True if math-verify extracts an equal answer from both texts. It runs in the sandbox, and a
        text that takes it too long is wrong."""
        response = response[-MAX_RESPONSE:]
        if self.last_box:
            response = keep_last_box(response)
        verdict = SANDBOX.ask("math_verify", gold, asdict(self), answer=response, deadline=DEADLINE)
        return verdict == Verdict.CORRECT.value


def is_equivalent(gold: str, answer: str) -> bool:
    """Return True if two answers are the same LaTeX after the normalisation of Hendrycks et al. 2021 (arXiv
    2103.03874, `math_equivalence.py`). Texts that cannot be normalised must be equal as they stand."""
    try:
        return normalise(gold) == normalise(answer)
    except ValueError:
        return gold == answer


def boxed_answer(text: str) -> str | None:
    """Return the content of the last box of a response for a majority vote, in the normal form of Hendrycks
    et al. and without leading zeros; None if there is no box, or nothing in it."""
    box = last_box(text)
    if not box:
        return None
    try:
        answer = normalise(box)
    except ValueError:
        answer = box
    return (answer.lstrip("0") or "0") if answer.isdecimal() else answer or None


_REMOVED = ("\n", r"\!")
_RENAMED = ((r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_IGNORED = (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")
UNIT = r"\text{ "  # in MATH's solutions this only begins a unit


def normalise(text: str) -> str:
    """Return an answer in the normal form of Hendrycks et al. Raises ValueError if it has none."""
    for removed in _REMOVED:
        text = text.replace(removed, "")
    for old, new in _RENAMED:
        text = text.replace(old, new)
    for ignored in _IGNORED:
        text = text.replace(ignored, "")
    if text.count(UNIT) > 1:
        raise ValueError("several units")
    text = text.split(UNIT)[0].replace(r"\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    before, _, after = text.partition("=")
    if text.count("=") == 1 and len(before) <= 2:
        text = after
    text = _brace_roots(text).replace(" ", "")
    text = _brace_fractions(text)
    return r"\frac{1}{2}" if text == "0.5" else _to_fraction(text)


def _brace_roots(text: str) -> str:
    r"""Return the text with `\sqrt{3}` for `\sqrt3`."""
    first, *parts = text.split(r"\sqrt")
    for part in parts:
        if not part:
            raise ValueError("a root of nothing")
        first += rf"\sqrt{part}" if part[0] == "{" else rf"\sqrt{{{part[0]}}}{part[1:]}"
    return first


def _brace_fractions(text: str) -> str:
    r"""Return the text with `\frac{1}{2}` for `\frac12` and for `\frac1{2}`."""
    first, *parts = text.split(r"\frac")
    for part in parts:
        if not part:
            raise ValueError("a fraction of nothing")
        if part[0] == "{":
            first += rf"\frac{part}"
            continue
        if len(part) < 2:
            return text
        below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
        first += rf"\frac{{{part[0]}}}{below}"
    return first


def _to_fraction(text: str) -> str:
    r"""Return `\frac{3}{4}` for `3/4`, and any other text as it is. Raises ValueError where the two parts are
    no whole numbers."""
    if text.count("/") != 1:
        return text
    above, below = map(int, text.split("/"))
    return rf"\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
