"""Text to ids and back, the chat template, and the splitting of thought from answer: the only such door."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.sandbox
import numpy as np
import tokenizers

from ..types import LimbeckError, Message, Thought

OPEN, CLOSE = "<think>", "</think>"
PATIENCE = 2.0  # seconds for one conversation
HALF = "\ufffd"  # what stands for bytes that are no character, or not yet
MOST_HALVES = 3  # a character has four bytes at most
KEPT, WINDOW = (
    8,
    32,
)  # tokens that a reader looks back on, and how many it gathers before it forgets the older ones


class Tokenizer:
    """A HuggingFace `tokenizer.json` with its chat template and its end-of-turn token."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str, end: str, pad: str, bos: str = ""):
        self.backend, self.template, self.end, self.pad, self.bos = backend, template, end, pad, bos
        self.end_id, self.pad_id = self._id(end), self._id(pad)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read the files that every HF checkpoint carries; a missing one is an error that names it."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise LimbeckError(f"{path} is missing; copy it from the model's source")
        settings = _json(directory / "tokenizer_config.json")
        template_file = directory / "chat_template.jinja"
        template = (
            template_file.read_text(encoding="utf-8")
            if template_file.exists()
            else settings.get("chat_template")
        )
        if not template:
            raise LimbeckError(
                f"{template_file} is missing; a chat template says how a question becomes a prompt"
            )
        backend = tokenizers.Tokenizer.from_file(str(path))
        end = _content(settings.get("eos_token"))
        if not end:
            raise LimbeckError(
                f"{directory / 'tokenizer_config.json'}: eos_token is missing; name the end-of-turn token"
            )
        pad = _content(settings.get("pad_token")) or end
        return cls(backend, template, end, pad, _content(settings.get("bos_token")))

    def save(self, directory: Path) -> None:
        """Write what `from_directory` reads; transformers' AutoTokenizer reads it too."""
        self.backend.save(str(directory / "tokenizer.json"))
        (directory / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end,
            "pad_token": self.pad,
            **({"bos_token": self.bos} if self.bos else {}),
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        )

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of the tokens; tags such as `<think>` stay, the end-of-turn token goes."""
        return self.backend.decode([int(t) for t in tokens if t != self.end_id], skip_special_tokens=False)

    def label(self, token: int) -> str:
        """One token to be shown by itself: its text, or its name where it has none of its own."""
        text = self.backend.decode([token], skip_special_tokens=False)
        return text if text and HALF not in text else self.backend.id_to_token(token) or ""

    def prompt(self, question: str | Sequence[Message]) -> np.ndarray:
        """Token ids of a question, or of a conversation, up to where the assistant begins."""
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return np.array(self.encode(self.render(messages)), dtype=np.int64)

    def response(self, text: str) -> np.ndarray:
        """Token ids of a written (not sampled) response, end-of-turn included."""
        return np.array([*self.encode(text), self.end_id], dtype=np.int64)

    def render(self, messages: Sequence[Message], opened: bool = True) -> str:
        """The conversation as one string; `opened` leaves it where the assistant's turn begins."""
        try:
            with _within(PATIENCE):
                return self._compiled.render(
                    messages=list(messages),
                    add_generation_prompt=opened,
                    bos_token=self.bos,
                    eos_token=self.end,
                )
        except Exception as error:  # noqa: BLE001 - a template is somebody's program, in which anything happens
            raise LimbeckError(f"chat_template.jinja: {error}; mend the template beside the model") from None

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = _Cell(trim_blocks=True, lstrip_blocks=True)

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        return environment.from_string(self.template)

    def _id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise LimbeckError(f"tokenizer.json has no token {token!r}, which tokenizer_config.json names")
        return found

    @property
    def size(self) -> int:
        return self.backend.get_vocab_size()


class _Cell(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Templates are programs and come from strangers: no attribute access, nothing changed, nothing grown huge."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
        sizes = [
            abs(x) if isinstance(x, int) else len(x) if hasattr(x, "__len__") else 0 for x in (left, right)
        ]
        if (operator == "**" and max(sizes) > 64) or (operator == "*" and sizes[0] * sizes[1] > 1 << 20):
            raise jinja2.sandbox.SecurityError(f"{operator} makes something too large")
        return super().call_binop(context, operator, left, right)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Give up on a template that runs for ever: its every line looks at the clock."""
    end, before = (
        time.thread_time() + seconds,
        sys.gettrace(),
    )  # its own time: a busy machine is no endless loop

    def look(*_: object) -> Callable:
        if time.thread_time() > end:
            raise jinja2.TemplateError(f"the template ran for more than {seconds:g} seconds")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker that is not whole yet.

    >>> overlap("so it is 4</th", "</think>")
    4
    """
    longest = range(min(len(text), len(marker) - 1), 0, -1)
    return next((n for n in longest if marker.startswith(text[-n:])), 0)


class Reader:
    """Tokens in, text out as soon as it is certain: what may still become a character waits for its rest. All pieces
    and what `close` gives are together `Tokenizer.decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.window: list[int] = []  # the last tokens: some have their text from those before
        self.given = ""  # how much of the window's text is out

    def read(self, tokens: Sequence[int]) -> str:
        self.window += tokens
        text = self.tokenizer.decode(self.window)
        halves = len(text) - len(text.rstrip(HALF))
        certain = text[: len(text) - min(halves, MOST_HALVES)]
        fresh, self.given = certain[len(self.given) :], max(certain, self.given, key=len)
        if not halves and len(self.window) > WINDOW:
            self._forget(text)
        return fresh

    def _forget(self, text: str) -> None:
        """All but the last tokens, if these say the same without the others."""
        kept = self.window[-KEPT:]
        tail = self.tokenizer.decode(kept)
        if text.endswith(tail) and HALF not in tail:
            self.window, self.given = kept, tail

    def close(self) -> str:
        """What was still waiting."""
        return self.tokenizer.decode(self.window)[len(self.given) :]


class ReasoningParser:
    """A completion taken apart while it is being said: `hear` gives what is certain, as pieces of ("thought", text) and
    ("answer", text). Tags are never given, nor is the space around thought and answer. `opened`: the prompt ends inside
    a thought. `stops` end an answer, never a thought. `plain` text is all answer, and its space is kept."""

    def __init__(self, opened: bool = False, stops: Sequence[str] = (), plain: bool = False):
        self.kind = "answer" if plain else "thought" if opened else ""
        self.stops, self.plain = tuple(stops), plain
        self.waiting, self.begun, self.stopped = "", plain, False

    def hear(self, text: str) -> list[tuple[str, str]]:
        self.waiting += text
        pieces: list[tuple[str, str]] = []
        if not self.kind:
            self._open()
        if self.kind == "thought":
            thought, close, rest = self.waiting.partition(CLOSE)
            if close:
                self._give(pieces, thought.rstrip(), "")
                self.kind, self.begun, self.waiting = "answer", False, rest
            else:
                self._give(pieces, *self._certain((CLOSE,)))
        if self.kind == "answer" and not self.stopped:
            self._answer(pieces)
        return pieces

    def _open(self) -> None:
        begin = self.waiting.lstrip()
        if begin.startswith(OPEN):
            self.kind, self.waiting = "thought", begin.removeprefix(OPEN)
        elif not OPEN.startswith(begin):
            self.kind = "answer"

    def _answer(self, pieces: list[tuple[str, str]]) -> None:
        if not self.begun:
            self.waiting = self.waiting.lstrip()
        found = min((at for at in map(self.waiting.find, self.stops) if at >= 0), default=-1)
        if found >= 0:
            said = self.waiting[:found]
            self.stopped = True
            self._give(pieces, said if self.plain else said.rstrip(), "")
        else:
            self._give(pieces, *self._certain(self.stops))

    def _certain(self, markers: Sequence[str]) -> tuple[str, str]:
        """What is said for good, and what may be the beginning of a marker, or space that nothing follows."""
        held = max((overlap(self.waiting, marker) for marker in markers), default=0)
        said = self.waiting[: len(self.waiting) - held]
        said = said if self.plain else said.rstrip()
        return said, self.waiting[len(said) :]

    def _give(self, pieces: list[tuple[str, str]], said: str, waiting: str) -> None:
        said, self.waiting = said if self.begun else said.lstrip(), waiting
        if said:
            self.begun = True
            pieces.append((self.kind, said))

    def close(self) -> list[tuple[str, str]]:
        """What was still waiting, as no more will come."""
        pieces: list[tuple[str, str]] = []
        if not self.stopped:
            kind, said = self.kind or "answer", self.waiting if self.plain else self.waiting.rstrip()
            self.kind = kind
            self._give(pieces, said, "")
        return pieces


def split_thought(text: str) -> Thought:
    """Take a completion apart. Well-formed: one `</think>`, at most one `<think>` and that at the very start.

    >>> split_thought("<think>2 and 2</think>4")
    Thought(thought='2 and 2', answer='4', wellformed=True)
    """
    opens, closes = text.count(OPEN), text.count(CLOSE)
    if not closes:
        return Thought(text.split(OPEN, 1)[1].strip() if opens else "", "" if opens else text.strip(), False)
    before, answer = text.split(CLOSE, 1)
    head, _, thought = before.rpartition(OPEN)
    wellformed = closes == 1 and opens <= 1 and not head.strip()
    return Thought((thought if opens else before).strip(), answer.strip(), wellformed)


def join_thought(thought: str, answer: str) -> str:
    """The completion that `split_thought` takes apart; without a thought the answer alone."""
    return f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{answer}" if thought.strip() else answer


def _json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LimbeckError(f"{path}: not valid JSON ({error})") from None


def _content(token: str | dict | None) -> str:
    return (token["content"] if isinstance(token, dict) else token) or ""
