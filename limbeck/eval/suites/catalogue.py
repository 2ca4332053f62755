"""The suites by name, and those that are refused."""

from __future__ import annotations

from ...types import LimbeckError
from .instructions import IFEVAL
from .mathematics import AIME_2024, AIME_2025, CMATH, GSM8K, MATH_500
from .multiple_choice import C_EVAL, GPQA_DIAMOND, MMLU_PRO
from .suite import Protocol, Suite

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (GSM8K, MATH_500, AIME_2024, AIME_2025, GPQA_DIAMOND, MMLU_PRO, IFEVAL, C_EVAL, CMATH)
}
CODE = ("humaneval", "mbpp", "livecodebench")


def find_suite(name: str) -> Suite:
    """Return the suite of a name. Raises LimbeckError for a name that there is not, and for the suites of
    programming."""
    if name in CODE:
        raise LimbeckError(
            f"--suite {name}: its metric runs programs that the model writes, and Limbeck runs none; measure "
            "it with another harness against `limbeck serve`"
        )
    if name not in SUITES:
        raise LimbeckError(f"--suite {name}: there is no such suite; choose {', '.join(SUITES)}")
    return SUITES[name]


def find_protocol(suite: Suite, name: str) -> Protocol:
    """Return the protocol of a suite with a name. Raises LimbeckError if the suite has none of that name."""
    for protocol in suite.protocols:
        if protocol.name == name:
            return protocol
    names = ", ".join(protocol.name for protocol in suite.protocols)
    raise LimbeckError(f"--as {name}: {suite.name} is measured as {names}")
