"""The sandbox's child process: it loads the judges, and forks for each answer a process without any access.

A judge is built from its question (`mathematics(gold)`) before the answer is read; a process of its own then
reads the answer. In that process sympy's parser accepts numerals only, `eval` and `compile` are gone, and
`exec` makes sympy's arithmetic of monomials and nothing else.
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

from . import confinement, grammar
from .generators import SCORED, elementary, unpack
from .sandbox import WALL_FACTOR

MEMORY = 2 << 30  # bytes of address space
VERDICTS = ("correct", "wrong", "unparsed", "error")
FIRST_CODE = 64  # exit codes from here on are results; Python itself exits with smaller ones
ROUNDING = 12  # digits to which floats must agree
FULL_SCORE = 1.0  # of a reasoning-gym scorer: partial scores reward substrings
Judge = Callable[[str], str]
Layers = tuple[int, bool]  # the Landlock version, and True with seccomp


def serve() -> None:
    """Write a line with the proven confinement; then for each question a line `started` and one with the
    verdict."""
    logging.disable()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library's output must not become a verdict
    questions = os.fdopen(os.dup(0), "rb")
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    layers, reaches = _prove_confinement()
    replies.write("|".join([*map(str, layers), *reaches]) + "\n")
    while head := questions.readline():
        request = json.loads(head)
        answer = questions.read(request["answer"])
        name, *arguments = request["question"]
        try:
            judge = JUDGES[name](*arguments)
        except Exception:  # noqa: BLE001 - a library is missing, or cannot build this judge
            replies.write("error\n")
            continue
        replies.write("started\n")
        verdict = _judge_in_fork(judge, answer, request["deadline"], layers)
        replies.write(f"{verdict}\n")


def _prove_confinement() -> tuple[Layers, list[str]]:
    """The layers that were applied in one process, and the accesses that another was refused."""
    parent = os.getpid()

    def apply() -> int:
        landlock, seccomp = confinement.confine()
        return FIRST_CODE + 2 * landlock + seccomp

    def attempt() -> int:
        confinement.confine()
        return FIRST_CODE + confinement.attempt(parent)

    layers = max(0, _run_in_fork(apply) - FIRST_CODE)
    refused = max(0, _run_in_fork(attempt) - FIRST_CODE)
    reaches = [reach for bit, reach in enumerate(confinement.REACHES) if refused >> bit & 1]
    return (layers >> 1, bool(layers & 1)), reaches


def _judge_in_fork(judge: Judge, answer: bytes, deadline: float, layers: Layers) -> str:
    """The verdict of a process that confines itself, in the layers that were proven, judges and exits."""

    def work() -> int:
        _disarm()
        signal.setitimer(signal.ITIMER_PROF, deadline)
        signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * deadline + 1)
        if confinement.confine() != layers:
            return FIRST_CODE + VERDICTS.index("error")
        verdict = judge(answer.decode("utf-8", "surrogatepass"))
        return FIRST_CODE + VERDICTS.index(verdict)

    code = _run_in_fork(work)
    if -code in (signal.SIGPROF, signal.SIGALRM):
        return "timeout"
    index = code - FIRST_CODE
    return VERDICTS[index] if 0 <= index < len(VERDICTS) else "error"


def _disarm() -> None:
    """Remove from Python all that turns text into code; math-verify hands the digits of a number to sympy's
    parser."""
    builtin_exec = builtins.exec

    def exec_monomials(code: Any, names: dict) -> None:
        if sys._getframe(1).f_globals.get("__name__") != "sympy.polys.monomials":
            raise PermissionError("exec is not for answers")
        builtin_exec(code, names)  # code made from the number of variables alone

    def parse_numeral(text: str, **_: Any) -> Any:
        sympy = sys.modules["sympy"]
        if not re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?|[-+]?\.[0-9]+", text):
            raise sympy.SympifyError(text)
        return sympy.Float(text) if "." in text else sympy.Integer(int(text))

    parser = sys.modules.get("sympy.parsing.sympy_parser")
    if parser:
        parser.parse_expr = parse_numeral
    builtins.exec = exec_monomials
    builtins.eval = None
    builtins.compile = None


def _run_in_fork(work: Callable[[], int]) -> int:
    """The exit code of a process that does `work`: its result, or minus the signal that ended the process."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        for clock in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(clock, signal.SIG_DFL)  # the kernel ends the process, whatever C code is running
        code = work()
    finally:
        os._exit(code)


# ---------------------------------------------------------------- judges


@lru_cache
def _load_sympy() -> None:
    """Import math-verify, and all of sympy that may be imported late: after the confinement no file can be
    opened."""
    for name in _PACKAGES.split():
        package = importlib.import_module(f"sympy.{name}")
        for module in pkgutil.iter_modules(package.__path__, f"sympy.{name}."):
            if not module.ispkg and not module.name.endswith(("_doc", "wrapper", "connector")):
                importlib.import_module(module.name)
    importlib.import_module("sympy.physics.units.systems")  # degrees and centimetres
    for latex in _WARM_UP:  # antlr is slow when it parses a construct for the first time
        expression = _parse_latex(latex)
        _is_same(expression, expression)
    gc.freeze()


_PACKAGES = (
    "assumptions assumptions.handlers assumptions.predicates calculus concrete discrete functions integrals "
    "logic.algorithms matrices.expressions ntheory polys series sets sets.handlers simplify solvers"
)
_WARM_UP = (
    r"x+1", r"-2(x+1)^2", r"\frac{1}{2}", r"\sqrt{2}+x^2", r"(1, 2)", r"\{1, 2\}",
    r"[0, 1) \cup (2, \infty)", r"x = 5", r"x < 3", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"2\pi",
    r"\sin(x) + \log_2 8", r"5!", r"\binom{5}{2}", r"30^\circ", r"12\%", r"e^{i\pi}", r"\int x dx",
    r"\sum_{i=1}^{3} i", r"|x|", r"3\text{ cm}", r"1{,}234.5",
)  # fmt: skip


def _parse_latex(latex: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${latex}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)


def _is_same(gold: list, answer: list) -> bool:
    from math_verify import verify

    return verify(gold, answer, float_rounding=ROUNDING, timeout_seconds=None)


def mathematics(gold: str) -> Judge:
    """A judge by math-verify on two LaTeX strings; floats agree to 12 digits, so 1.41421356 is not the root
    of 2."""
    _load_sympy()

    def judge(answer: str) -> str:
        wanted = _parse_latex(gold)
        given = _parse_latex(answer)
        if not wanted or not given:
            return "unparsed"
        return "correct" if _is_same(wanted, given) else "wrong"

    return judge


@lru_cache
def _dataset(generator: str, config: str) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(generator, **{**json.loads(config), "seed": 0, "size": 1})


def scorer(generator: str, config: str, entry: Any) -> Judge:
    """A judge by a reasoning-gym generator's own scorer; only a full score is correct."""
    dataset = _dataset(generator, config)
    entry = unpack(entry)
    read = SCORED[generator]

    def judge(answer: str) -> str:
        try:
            form = read(answer)
        except grammar.ParseError:
            return "unparsed"
        return "correct" if dataset.score_answer(form, entry) >= FULL_SCORE else "wrong"

    return judge


def integral(integrand: str, letter: str) -> Judge:
    """A judge that differentiates the answer and compares with the integrand: both are built from the
    grammar's tree."""
    import sympy

    _load_sympy()

    def judge(answer: str) -> str:
        try:
            wanted = grammar.symbolic(elementary(integrand, letter))
            given = grammar.symbolic(elementary(answer, letter))
        except grammar.ParseError:
            return "unparsed"
        difference = sympy.diff(given, sympy.Symbol(letter)) - wanted
        return "correct" if sympy.simplify(difference) == 0 else "wrong"

    return judge


# Each imports its library once, in the child, which never reads an answer.
JUDGES: dict[str, Callable[..., Judge]] = {"mathematics": mathematics, "scorer": scorer, "integral": integral}
