"""Chat templates, which render a conversation as one string. A template is a program that comes with a
checkpoint and is not trusted, so it runs in a restricted environment."""

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
    """A chat template in jinja, as in HuggingFace checkpoints. `bos` and `eos` are the texts of the special
    tokens that it may insert."""

    def __init__(self, source: str, bos: str, eos: str):
        self.source = source
        self.bos = bos
        self.eos = eos

    def render(self, messages: Sequence[Message], opened: bool) -> str:
        """Return the conversation as one string. If `opened`, the string ends where the assistant's next turn
        begins (the template's `add_generation_prompt`).

        Raises any error that the template or jinja raises, and jinja's TemplateError after `RENDER_TIMEOUT`.
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
    """Return the LimbeckError that reports any `error` of a template."""
    return LimbeckError(f"chat_template.jinja: {error}; mend the template beside the model")


class _SandboxedTemplates(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A jinja environment in which templates cannot access private attributes, change their arguments, or
    compute huge results with `*` and `**`."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
        """Return the result of `*` or `**`. Raises SecurityError if the result would be too large."""
        sizes = (_size(left), _size(right))
        too_large = max(sizes) > MAX_POWER if operator == "**" else sizes[0] * sizes[1] > MAX_PRODUCT
        if too_large:
            raise jinja2.sandbox.SecurityError(f"{operator} makes something too large")
        return super().call_binop(context, operator, left, right)


def _size(value: object) -> int:
    """Return the absolute value of an integer, the length of a container, or 0 for any other value."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if hasattr(value, "__len__") else 0


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise jinja's TemplateError in a template that runs for more than `seconds`: a trace function checks
    the clock at each line.

    Only the processor time of the thread counts, so that a template is not stopped because the machine is
    busy.
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
