"""The referee's child: it loads the judges, and forks for each answer a process that reaches nothing.

A judge is made from what it needs to know (`mathematics(gold)`), before the answer is read; a process of its own
then reads the answer. There, sympy's parser takes numerals only, `eval` and `compile` are gone, and `exec` makes
sympy's arithmetic of monomials and nothing else.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import json
import logging
import os
import pkgutil
import re
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from . import grammar, sandbox
from .generators import SCORED, elementary, unpacked
from .referee import PATIENCE

MEMORY = 2 << 30  # bytes of address space
VERDICTS = ("correct", "wrong", "unparsed", "error")
TOLD = 64  # exit codes from here on tell something; Python ends by itself with smaller ones
Judge = Callable[[str], str]


def serve() -> None:
    """Tell what was proven; then answer questions until the pipe closes: `started`, and the verdict, on lines."""
    logging.disable()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no verdict
    questions = os.fdopen(os.dup(0), "rb")
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    layers, reaches = _proven()
    replies.write("|".join([*map(str, layers), *reaches]) + "\n")
    while head := questions.readline():
        asked = json.loads(head)
        answer = questions.read(asked["answer"])
        try:
            judge = JUDGES[asked["question"][0]](*asked["question"][1:])
        except Exception:  # noqa: BLE001 — a library that is not there, or that cannot make this judge
            replies.write("error\n")
            continue
        replies.write("started\n")
        replies.write(f"{_apart(judge, answer, asked['deadline'], layers)}\n")


def _proven() -> tuple[tuple[int, bool], list[str]]:
    """The layers that were applied in one process, and what another could not reach."""
    parent = os.getpid()

    def applied() -> int:
        landlock, seccomp = sandbox.confine()
        return TOLD + 2 * landlock + seccomp

    def refused() -> int:
        sandbox.confine()
        return TOLD + sandbox.attempt(parent)

    layers, bits = (max(0, _ended(work) - TOLD) for work in (applied, refused))
    reaches = [reach for bit, reach in enumerate(sandbox.REACHES) if bits >> bit & 1]
    return (layers >> 1, bool(layers & 1)), reaches


def _apart(judge: Judge, answer: bytes, deadline: float, layers: tuple[int, bool]) -> str:
    """The verdict of a process that confines itself, in the layers that were proven, judges and ends."""

    def judged() -> int:
        _disarm()
        signal.setitimer(signal.ITIMER_PROF, deadline)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * deadline + 1)
        if sandbox.confine() != layers:
            return TOLD + VERDICTS.index("error")
        return TOLD + VERDICTS.index(judge(answer.decode("utf-8", "surrogatepass")))

    code = _ended(judged)
    if -code in (signal.SIGPROF, signal.SIGALRM):
        return "timeout"
    return VERDICTS[code - TOLD] if TOLD <= code < TOLD + len(VERDICTS) else "error"


def _disarm() -> None:
    """Take from Python what turns text into code; math-verify hands the digits of a number to sympy's parser."""
    run = builtins.exec

    def generated(code: Any, names: dict) -> None:
        if sys._getframe(1).f_globals.get("__name__") != "sympy.polys.monomials":
            raise PermissionError("exec is not for answers")
        run(code, names)  # made from the number of generators

    def numeral(text: str, **_: Any) -> Any:
        sympy = sys.modules["sympy"]
        if not re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?|[-+]?\.[0-9]+", text):
            raise sympy.SympifyError(text)
        return sympy.Float(text) if "." in text else sympy.Integer(int(text))

    if parser := sys.modules.get("sympy.parsing.sympy_parser"):
        parser.parse_expr = numeral
    builtins.exec, builtins.eval, builtins.compile = generated, None, None


def _ended(work: Callable[[], int]) -> int:
    """The exit code of a process that does `work`: what it returned, or minus the signal that ended it."""
    if not (pid := os.fork()):
        code = 1
        try:
            for clock in (signal.SIGPROF, signal.SIGALRM):
                signal.signal(clock, signal.SIG_DFL)  # the kernel ends us, whatever C code is doing
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------- judges


@lru_cache
def _loaded() -> None:
    """math-verify, and all of sympy that may be imported late: afterwards no file can be opened."""
    from math_verify import LatexExtractionConfig, parse, verify

    for room in _ROOMS.split():
        package = importlib.import_module(f"sympy.{room}")
        for module in pkgutil.iter_modules(package.__path__, f"sympy.{room}."):
            if not module.ispkg and not module.name.endswith(("_doc", "wrapper", "connector")):
                importlib.import_module(module.name)
    importlib.import_module("sympy.physics.units.systems")  # degrees and centimetres
    for latex in _USUAL:  # antlr is slow when it reads something for the first time
        read = parse(f"${latex}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)
        verify(read, read, float_rounding=12, timeout_seconds=None)
    gc.freeze()


_ROOMS = (
    "assumptions assumptions.handlers assumptions.predicates calculus concrete discrete functions integrals "
    "logic.algorithms matrices.expressions ntheory polys series sets sets.handlers simplify solvers"
)
_USUAL = (
    r"x+1", r"-2(x+1)^2", r"\frac{1}{2}", r"\sqrt{2}+x^2", r"(1, 2)", r"\{1, 2\}", r"[0, 1) \cup (2, \infty)", r"x = 5", r"x < 3",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"2\pi", r"\sin(x) + \log_2 8", r"5!", r"\binom{5}{2}",
    r"30^\circ", r"12\%", r"e^{i\pi}", r"\int x dx", r"\sum_{i=1}^{3} i", r"|x|", r"3\text{ cm}", r"1{,}234.5",
)  # fmt: skip


def mathematics(gold: str) -> Judge:
    """math-verify on two LaTeX strings; floats agree to 12 digits, so 1.41421356 is not the root of 2."""
    from math_verify import LatexExtractionConfig, parse, verify

    _loaded()

    def read(latex: str) -> list:
        return parse(f"${latex}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)

    def judge(answer: str) -> str:
        wanted, given = read(gold), read(answer)
        if not wanted or not given:
            return "unparsed"
        same = verify(wanted, given, float_rounding=12, timeout_seconds=None)
        return "correct" if same else "wrong"

    return judge


@lru_cache
def _dataset(generator: str, config: str) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(generator, **{**json.loads(config), "seed": 0, "size": 1})


def scorer(generator: str, config: str, entry: Any) -> Judge:
    """A reasoning-gym generator's own scorer; only full marks count, its partial ones pay for substrings."""
    dataset, entry, read = _dataset(generator, config), unpacked(entry), SCORED[generator]

    def judge(answer: str) -> str:
        try:
            form = read(answer)
        except grammar.Unread:
            return "unparsed"
        return "correct" if dataset.score_answer(form, entry) >= 1.0 else "wrong"

    return judge


def integral(integrand: str, letter: str) -> Judge:
    """Whether the answer's derivative is the integrand: both are put together from the grammar's tree."""
    import sympy

    _loaded()

    def judge(answer: str) -> str:
        try:
            wanted, given = (grammar.symbolic(elementary(text, letter)) for text in (integrand, answer))
        except grammar.Unread:
            return "unparsed"
        difference = sympy.diff(given, sympy.Symbol(letter)) - wanted
        return "correct" if sympy.simplify(difference) == 0 else "wrong"

    return judge


# each imports its library once, in the child, where no answer was read
JUDGES: dict[str, Callable[..., Judge]] = {"mathematics": mathematics, "scorer": scorer, "integral": integral}
