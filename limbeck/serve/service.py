"""The models that are served, and how the API and the studio's pages talk to them: ask, and listen while they speak.

    async with aclosing(service.chat("r1", [{"role": "user", "content": "use 5 1 6 make 4 ?"}])) as pieces:
        async for piece in pieces:
            print(piece.kind, piece.text)

Leaving the loop frees the rows before the model's next step.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..engine.loop import EngineThread
from ..engine.request import Answer, Full, Request, Top
from ..engine.scheduler import Scheduler
from ..model.config import ModelConfig
from ..text.detokenizer import Reader
from ..text.reasoning_parser import CLOSE, OPEN, ReasoningParser, split_thought
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError, Message
from .metrics import Metrics

LONGEST_SEED = 53  # bits: what JSON's numbers hold


class UnknownModel(LimbeckError):
    """Nobody of that name is served."""


class ModelFailed(LimbeckError):
    """Our fault, not the asker's; the next request is served again."""

    exit_code = 70


@dataclass(frozen=True)
class Price:
    """Of a million tokens read and a million said: `Price(0.15, 0.6)`."""

    prompt: float
    completion: float

    def of(self, read: int, said: int) -> float:
        return (read * self.prompt + said * self.completion) / 1e6


@dataclass(frozen=True)
class Usage:
    """What an answer took: `Usage(prompt_tokens=12, cached_tokens=8, completion_tokens=90, reasoning_tokens=70)`.

    `cost` is in the unit of the model's price, None where none is set; `seconds_to_first` is until the first token.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cost: float | None = None
    seconds_to_first: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Said:
    """One sampled token: `Said(48, -0.02, ((48, -0.02), (56, -4.1)))`; log-probabilities at temperature 1."""

    token: int
    logprob: float
    top: Top


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: `Piece("thought", "try 5", tokens=2)`; the last of each choice is of kind "end" and has
    `finish`, the very last has `usage`. Text is what a model wrote: hostile until it has been made harmless."""

    kind: str
    text: str = ""
    tokens: int = 0
    choice: int = 0
    finish: str = ""
    usage: Usage | None = None
    said: tuple[Said, ...] = ()


@dataclass(frozen=True)
class Answered:
    """A whole answer: `Answered("5 -1 -6", "try 5 ...", "stop", usage)`."""

    answer: str
    thought: str
    finish: str
    usage: Usage | None = None
    said: tuple[Said, ...] = ()
    thought_said: tuple[Said, ...] = ()


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is to be sampled. `max_tokens` None is what the server gives; `top` is how many of the likeliest
    tokens are told beside each one said; `plain` text is not taken apart into thought and answer."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int | None = None
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    thought_budget: int | None = None
    top: int | None = None
    echo: bool = False
    endless: bool = False
    plain: bool = False


@dataclass(eq=False)
class Served:
    """One model and what answers for it. `longest` is what is said at most where a request sets nothing."""

    name: str
    folder: Path
    scheduler: Scheduler
    price: Price | None = None
    longest: int = 2048
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def config(self) -> ModelConfig:
        return self.scheduler.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.scheduler.tokenizer

    @property
    def rows(self) -> int:
        return self.scheduler.rows

    @property
    def busy(self) -> int:
        return self.scheduler.busy

    @property
    def waiting(self) -> int:
        return len(self.scheduler.line)

    def request(self, prompt: np.ndarray, wish: GenerationOptions, opened: bool = False) -> Request:
        room = self.config.max_positions - len(prompt)
        if room < 1 and wish.max_tokens is None:
            raise LimbeckError(
                f"the prompt has {len(prompt)} tokens, and {self.name} has only {self.config.max_positions} positions"
            )
        most = min(room, self.longest) if wish.max_tokens is None else wish.max_tokens
        seed = secrets.randbits(LONGEST_SEED) if wish.seed is None else wish.seed
        return Request(
            prompt,
            wish.temperature,
            wish.top_p,
            most,
            wish.n,
            seed,
            wish.thought_budget,
            opened,
            wish.top,
            wish.echo,
            wish.endless,
        )


class Service:
    """All models that one server serves."""

    def __init__(self, served: Sequence[Served] = ()):
        self.models: Mapping[str, Served] = {one.name: one for one in served}
        self.listening: dict[Answer, asyncio.Event] = {}
        self.metrics = Metrics(lambda: list(self.models.values()))
        self.engine_thread = EngineThread([one.scheduler for one in served])

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        for served in self.models.values():
            served.scheduler.tell = self._tell
        self.engine_thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.engine_thread.close)

    def model(self, name: str) -> Served:
        """Raises `UnknownModel`, which names those there are."""
        if name not in self.models:
            raise UnknownModel(
                f"model {name!r} is not served here; there are {', '.join(self.models) or 'none'}"
            )
        return self.models[name]

    def chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], keep_thoughts: bool = False, **wishes: Any
    ) -> AsyncIterator[Piece]:
        """Pieces of the assistant's next turn; `wishes` are those of `GenerationOptions`. Raises LimbeckError, `UnknownModel` or `Full`
        before the first piece. Thoughts in the history are left out unless `keep_thoughts`."""
        return self._chat(self.model(model), messages, keep_thoughts, GenerationOptions(**wishes))

    async def _chat(
        self, served: Served, messages: Sequence[Mapping[str, Any]], keep: bool, wish: GenerationOptions
    ) -> AsyncIterator[Piece]:
        answer = await self.ask(served, messages, wish, keep)
        async with aclosing(self.follow(served, answer, wish)) as pieces:
            async for piece in pieces:
                yield piece

    async def answer(self, model: str, messages: Sequence[Mapping[str, Any]], **wishes: Any) -> Answered:
        """The first choice as a whole."""
        return (await gathered(self.chat(model, messages, **wishes)))[0]

    async def ask(
        self,
        served: Served,
        messages: Sequence[Mapping[str, Any]],
        wish: GenerationOptions,
        keep_thoughts: bool = False,
    ) -> Answer:
        """Stand in line with a conversation. Somebody must `follow` or `forget` the answer."""
        prompt, opened = await asyncio.to_thread(_rendered, served.tokenizer, messages, keep_thoughts)
        return self.submit(served, [served.request(prompt, wish, opened)])[0]

    def submit(self, served: Served, requests: Sequence[Request]) -> list[Answer]:
        """Stand in line with all of them, or with none."""
        answers: list[Answer] = []
        try:
            for request in requests:
                answers.append(served.scheduler.submit(request))
        except Full:
            self.metrics.refused(served.name)
            raise
        finally:
            if len(answers) < len(requests):
                self.forget(served, answers)
        return answers

    def forget(self, served: Served, answers: Sequence[Answer]) -> None:
        """Nobody wants what has not been said yet."""
        for answer in answers:
            if not answer.done:
                served.scheduler.cancel(answer)

    async def follow(self, served: Served, answer: Answer, wish: GenerationOptions) -> AsyncIterator[Piece]:
        """Pieces of all choices, in the order in which they are said."""
        ears = [_ChoiceStream(served, answer, i, wish) for i in range(answer.request.copies)]
        event = self.listening[answer] = asyncio.Event()
        try:
            while not all(ear.closed for ear in ears):
                if not answer.done:
                    await event.wait()
                event.clear()
                if answer.error:
                    raise ModelFailed(
                        f"{served.name} could not go on: {answer.error or type(answer.error).__name__}"
                    ) from answer.error
                for ear in ears:
                    for piece in ear.hear():
                        last = piece.kind == "end" and all(ear.closed for ear in ears)
                        yield replace(piece, usage=_usage(served, answer, ears)) if last else piece
        finally:
            del self.listening[answer]
            self._count(served, answer, ears)
            self.forget(served, [answer])

    def _count(self, served: Served, answer: Answer, ears: Sequence[_ChoiceStream]) -> None:
        heard = all(ear.closed for ear in ears)
        end = "failed" if answer.error else ears[0].end if heard else "left"
        self.metrics.ended(served, answer, _usage(served, answer, ears), end)

    def _tell(self, answers: Sequence[Answer]) -> None:
        """Called on the engine's thread."""
        self.loop.call_soon_threadsafe(self._wake, answers)

    def _wake(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            if answer in self.listening:
                self.listening[answer].set()


class _ChoiceStream:
    """Turns one choice's tokens into deltas: detokenizes, separates reasoning from answer, applies stop strings."""

    def __init__(self, served: Served, answer: Answer, index: int, wish: GenerationOptions):
        self.served, self.answer, self.choice, self.index = served, answer, answer.choices[index], index
        self.reader = Reader(served.tokenizer)
        self.speech = ReasoningParser(answer.request.opened, wish.stop, wish.plain)
        self.heard = self.reasoning = 0
        self.closed, self.end = False, ""

    def hear(self) -> list[Piece]:
        """What has been said since."""
        if self.closed:
            return []
        finish, until = (
            self.choice.finish,
            len(self.choice.tokens),
        )  # in this order: who has finished says no more
        parts: list[list[Any]] = []  # kind, text, tokens, said
        while self.heard < until and not self.speech.stopped:
            self._token(parts)
        if finish and not self.speech.stopped:
            for kind, text in [*self.speech.hear(self.reader.close()), *self.speech.close()]:
                _add(parts, kind, text, 0, [])
        pieces = [
            Piece(kind, text, tokens, self.index, said=tuple(said)) for kind, text, tokens, said in parts
        ]
        if finish or self.speech.stopped:
            self.closed, self.choice.enough = True, True
            if not finish:
                self.served.scheduler.enough(self.choice)
            self.end = "stop" if self.speech.stopped else finish
            pieces.append(Piece("end", choice=self.index, finish=self.end))
        return pieces

    def _token(self, parts: list[list[Any]]) -> None:
        at, before = self.heard, self.speech.kind
        token = self.choice.tokens[at]
        tells = self.answer.request.top is not None and token != self.served.tokenizer.end_id
        said = [Said(token, self.choice.logprobs[at], self.choice.tops[at])] if tells else []
        text = self.reader.read([token])
        pieces = self.speech.hear(text) if text else []
        thinking = "thought" in (before, self.speech.kind)
        self.heard, self.reasoning = at + 1, self.reasoning + thinking
        _add(parts, "thought" if thinking else "answer", "", 1, said)
        for kind, text in pieces:
            _add(parts, kind, text, 0, [])


def _add(parts: list[list[Any]], kind: str, text: str, tokens: int, said: list[Said]) -> None:
    if parts and parts[-1][0] == kind:
        parts[-1][1] += text
        parts[-1][2] += tokens
        parts[-1][3] += said
    else:
        parts.append([kind, text, tokens, said])


async def gathered(pieces: AsyncIterator[Piece]) -> list[Answered]:
    """All choices as wholes."""
    texts: dict[int, dict[str, list[Piece]]] = {}
    ends: dict[int, Piece] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.kind == "end":
                ends[piece.choice] = piece
            else:
                texts.setdefault(piece.choice, {}).setdefault(piece.kind, []).append(piece)
    usage = next(piece.usage for piece in ends.values() if piece.usage)

    def whole(choice: int, kind: str) -> tuple[str, tuple[Said, ...]]:
        found = texts.get(choice, {}).get(kind, [])
        return "".join(piece.text for piece in found), tuple(one for piece in found for one in piece.said)

    answered = []
    for choice in sorted(ends):
        (answer, said), (thought, thought_said) = whole(choice, "answer"), whole(choice, "thought")
        answered.append(Answered(answer, thought, ends[choice].finish, usage, said, thought_said))
    return answered


def _usage(served: Served, answer: Answer, ears: Sequence[_ChoiceStream]) -> Usage:
    read, said = len(answer.request.prompt), sum(ear.heard for ear in ears)
    cost = served.price.of(read, said) if served.price else None
    first = answer.first or time.monotonic()
    return Usage(
        read,
        answer.cached,
        said,
        sum(ear.reasoning for ear in ears),
        cost,
        first - answer.asked,
        time.monotonic() - answer.asked,
    )


def _rendered(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], keep: bool
) -> tuple[np.ndarray, bool]:
    """Token ids of a conversation, and whether they end inside a thought."""
    text = tokenizer.render([_turn(message, keep) for message in messages])
    return np.array(tokenizer.encode(text), dtype=np.int64), text.rstrip().endswith(OPEN)


def _turn(message: Mapping[str, Any], keep: bool) -> Message:
    """One turn as templates know it: its thought apart, under whichever name or tag it came, or left out."""
    content, thought = (
        message.get("content") or "",
        message.get("reasoning_content") or message.get("reasoning") or "",
    )
    if message["role"] == "assistant" and CLOSE in content:
        inside, content, _ = split_thought(content)
        thought = thought or inside
    turn = Message(role=message["role"], content=content)
    return {**turn, "reasoning_content": thought} if keep and thought else turn
