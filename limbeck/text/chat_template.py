"""Chat templates: a conversation rendered as one string. Templates are programs of unknown origin, and run
restricted."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import jinja2
import jinja2.sandbox

from ..types import LimbeckError, Message

RENDER_TIMEOUT = 2.0  # seconds of processor time for one conversation
MAX_POWER = 64  # largest operand of `**`
MAX_PRODUCT = 1 << 20  # characters or items of a result of `*`


class ChatTemplate:
    """A jinja template of a HuggingFace checkpoint; `bos` and `eos` are its special tokens."""

    def __init__(self, source: str, bos: str, eos: str):
        self.source = source
        self.bos = bos
        self.eos = eos

    def render(self, messages: Sequence[Message], opened: bool) -> str:
        """The conversation as one string; with `opened` it ends where the assistant's turn begins.

        Raises the template's own errors, and jinja's.
        """
        with _time_limit(RENDER_TIMEOUT):
            return self._compiled.render(
                messages=list(messages),
                add_generation_prompt=opened,
                bos_token=self.bos,
                eos_token=self.eos,
            )

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = _SandboxedTemplates(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        return environment.from_string(self.source)


def template_error(error: Exception) -> LimbeckError:
    """The message for any error of a template."""
    return LimbeckError(f"chat_template.jinja: {error}; mend the template beside the model")


class _SandboxedTemplates(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """No access to private attributes, no changes to arguments, and no huge results."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
        """The result of `*` or `**`. Raises SecurityError if it would be too large."""
        sizes = (_size(left), _size(right))
        too_large = max(sizes) > MAX_POWER if operator == "**" else sizes[0] * sizes[1] > MAX_PRODUCT
        if too_large:
            raise jinja2.sandbox.SecurityError(f"{operator} makes something too large")
        return super().call_binop(context, operator, left, right)


def _size(value: object) -> int:
    """The absolute value of an integer, the length of a container, else 0."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if hasattr(value, "__len__") else 0


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TemplateError in a template that runs for too long: each of its lines checks the clock.

    The thread's own time counts: on a busy machine a template is not stopped for waiting.
    """
    end = time.thread_time() + seconds
    previous = sys.gettrace()

    def check_clock(*_: object) -> Callable:
        if time.thread_time() > end:
            raise jinja2.TemplateError(f"the template ran for more than {seconds:g} seconds")
        return check_clock

    sys.settrace(check_clock)
    try:
        yield
    finally:
        sys.settrace(previous)
