"""The child process of the sandbox: it loads the judges, and for each answer forks a process that has no
access to files, network or other processes.

A judge is built from its question, as in `mathematics(gold)`, before the answer is read; the forked process
then judges the answer. In that process sympy's parser accepts numerals only, `eval` and `compile` are
removed, and `exec` works only for sympy's own arithmetic of monomials.
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
FULL_SCORE = 1.0  # a reasoning-gym scorer's score of a correct answer; substrings get lower scores
Judge = Callable[[str], str]
Layers = tuple[int, bool]  # the Landlock version, and True with seccomp


def serve() -> None:
    """Write a line that states the tested confinement, then answer requests until the input ends: for each,
    write a line `started` and a line with the verdict."""
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
    """Confine two forked processes. Return the layers of confinement that were applied in the first, and the
    kinds of access that the second attempted and was refused."""
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
    """Return the verdict on an answer, judged in a forked process that first confines itself. The verdict is
    `error` if the confinement has other `layers` than those that were tested, `timeout` if a timer ends the
    process."""

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
    """Remove from this process the functions that turn text into code. This matters because math-verify
    passes the digits of a number to sympy's parser, which evaluates them."""
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
    """Run `work` in a forked process and return its exit code: the result of `work`, or the negative number
    of the signal that ended the process."""
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
    """Import math-verify and all modules of sympy that are otherwise imported late, since a confined process
    can open no files."""
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
    """Return a judge that compares LaTeX answers with the gold answer by math-verify. Floats must agree to 12
    digits, so 1.41421356 does not equal the root of 2."""
    _load_sympy()

    def judge(answer: str) -> str:
        wanted = _parse_latex(gold)
        given = _parse_latex(answer)
        if not wanted or not given:
            return "unparsed"
        return "correct" if _is_same(wanted, given) else "wrong"

    return judge


def math_verify(gold: str, settings: dict[str, Any]) -> Judge:
    """Return a judge that compares whole responses with the gold text by the answers that math-verify
    extracts from both, as lm-eval and lighteval do. `settings` are the fields of `MathVerify`
    (`eval/suites/matching.py`)."""
    _load_sympy()
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, parser, verify

    kinds = {
        "latex": LatexExtractionConfig(boxed_match_priority=settings["boxed_priority"]),
        "expr": ExprExtractionConfig(),
    }
    wanted, targets = ([kinds[kind] for kind in settings[name]] for name in ("gold", "answer"))

    def judge(response: str) -> str:
        parser.parse_expr = _parse_arithmetic
        golds = parse(gold, wanted, parsing_timeout=None)
        answers = parse(response, targets, parsing_timeout=None)
        same = verify(golds, answers, float_rounding=settings["rounding"], timeout_seconds=None)
        return "correct" if same else "wrong"

    return judge


def _parse_arithmetic(text: str, **_: Any) -> Any:
    """Return the value of a sum such as `(3 + 4) / 2`, in place of sympy's parser, which would evaluate the
    text. Raises `ParseError` for anything else, and for a whole number such as 064, which Python refuses."""
    if re.search(r"(?<![0-9.])0+[1-9][0-9]*(?![0-9.])", text):
        raise grammar.ParseError("leading zeros")
    return grammar.symbolic(grammar.expression(text, powers=True))


@lru_cache
def _dataset(generator: str, config: str) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(generator, **{**json.loads(config), "seed": 0, "size": 1})


def scorer(generator: str, config: str, entry: Any) -> Judge:
    """Return a judge that applies the scorer of a reasoning-gym generator to an entry; only a full score is
    correct. `config` is the generator's config as JSON, `entry` the output of `generators.pack`."""
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
    """Return a judge that differentiates an answer with respect to the variable `letter` and compares the
    result with the integrand. Both are parsed by this package's grammar, not by sympy."""
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


# Each function imports its library once, in the child process, which never reads an answer.
JUDGES: dict[str, Callable[..., Judge]] = {
    "mathematics": mathematics,
    "math_verify": math_verify,
    "scorer": scorer,
    "integral": integral,
}
