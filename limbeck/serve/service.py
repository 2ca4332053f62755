"""The service over all models, used by the API and the studio: submit a request, stream its deltas.

    async with aclosing(service.chat("r1", [{"role": "user", "content": "use 5 1 6 make 4 ?"}])) as deltas:
        async for delta in deltas:
            print(delta.kind, delta.text)

A delta is a piece of the output as it is generated. Leaving the loop early aborts the request before the
model's next decode step.

Shapes: N tokens of a prompt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..engine.loop import EngineThread
from ..engine.request import Answer, DeviceFull, QueueFull, Request
from ..text.detokenizer import IncrementalDetokenizer
from ..text.reasoning_parser import CLOSE, OPEN, ReasoningParser, split_thought
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError, Message
from .metrics import Metrics
from .types import ChatOutput, Delta, GenerationOptions, ServedModel, TokenLogprob, Usage


class UnknownModel(LimbeckError):
    """Raised if no model of the requested name is served."""


class ModelFailed(LimbeckError):
    """Raised if the model has failed during generation.

    The fault is the server's, not the request's; later requests are served again.
    """

    exit_code = 70


class OutOfMemory(ModelFailed):
    """Raised if the memory of the device did not suffice for a request; others go on."""


class ModelUnavailable(LimbeckError):
    """Raised if the model of the requested name could not be loaded beside the others."""


class Service:
    """All models of one server, and the thread that runs them.

    It is an asynchronous context manager: the thread runs inside `async with`. `served` may be empty.
    `device` is the resolved name of what the models lie on; `unavailable` says of each model that it has no
    room for, by its name, why.
    """

    def __init__(
        self,
        served: Sequence[ServedModel] = (),
        device: str = "cpu",
        unavailable: Mapping[str, str] | None = None,
    ):
        self.models: Mapping[str, ServedModel] = {model.name: model for model in served}
        self.unavailable = unavailable or {}
        self.metrics = Metrics(served)
        self.engine_thread = EngineThread([model.scheduler for model in served], device)
        self._events: dict[Answer, asyncio.Event] = {}  # set when new tokens of an output can be streamed

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        for served in self.models.values():
            served.scheduler.tell = self._notify
        self.engine_thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.engine_thread.close)

    def model(self, name: str) -> ServedModel:
        """Return the model that is served under a name.

        Raises `UnknownModel`, whose message lists the served names, or `ModelUnavailable`.
        """
        if name in self.unavailable:
            raise ModelUnavailable(self.unavailable[name])
        if name not in self.models:
            names = ", ".join(self.models) or "none"
            raise UnknownModel(f"model {name!r} is not served here; there are {names}")
        return self.models[name]

    def chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], keep_thoughts: bool = False, **options: Any
    ) -> AsyncIterator[Delta]:
        """Return an iterator over the deltas of the assistant's next turn.

        `options` are the fields of `GenerationOptions`. Thoughts of earlier turns are left out of the prompt
        unless `keep_thoughts`.

        Raises `UnknownModel` at the call, LimbeckError or `QueueFull` before the first delta, and
        `ModelFailed` at any delta.
        """
        return self._chat(self.model(model), messages, keep_thoughts, GenerationOptions(**options))

    async def _chat(
        self,
        served: ServedModel,
        messages: Sequence[Mapping[str, Any]],
        keep_thoughts: bool,
        options: GenerationOptions,
    ) -> AsyncIterator[Delta]:
        """Submit a conversation to the model, then yield its deltas."""
        output = await self.submit_chat(served, messages, options, keep_thoughts)
        async with aclosing(self.stream(served, output, options)) as deltas:
            async for delta in deltas:
                yield delta

    async def answer(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatOutput:
        """Return the complete first choice of `chat`, with the same options and errors."""
        outputs = await collect(self.chat(model, messages, **options))
        return outputs[0]

    async def submit_chat(
        self,
        served: ServedModel,
        messages: Sequence[Mapping[str, Any]],
        options: GenerationOptions,
        keep_thoughts: bool = False,
    ) -> Answer:
        """Put a conversation into the model's queue and return its output, which fills with tokens later.

        The caller must pass the output to `stream` or `abort`, or the generation goes on unobserved. Raises
        LimbeckError or `QueueFull`.
        """
        prompt, opened = await asyncio.to_thread(_encode_chat, served.tokenizer, messages, keep_thoughts)
        request = served.request(prompt, options, opened)
        return self.submit(served, [request])[0]

    def submit(self, served: ServedModel, requests: Sequence[Request]) -> list[Answer]:
        """Put all requests into the model's queue, or none, and return their outputs, which fill later.

        Raises LimbeckError for a request that the model cannot serve, and `QueueFull` if the queue has no
        room.
        """
        outputs: list[Answer] = []
        try:
            for request in requests:
                outputs.append(served.scheduler.submit(request))
        except QueueFull:
            self.metrics.refused(served.name)
            raise
        finally:
            if len(outputs) < len(requests):
                self.abort(served, outputs)
        return outputs

    def abort(self, served: ServedModel, outputs: Sequence[Answer]) -> None:
        """Stop the generation of the outputs that are unfinished; the others are left as they are."""
        for output in outputs:
            if not output.done:
                served.scheduler.cancel(output)

    async def stream(
        self, served: ServedModel, output: Answer, options: GenerationOptions
    ) -> AsyncIterator[Delta]:
        """Yield the deltas of all choices of an output, in the order of generation.

        If the caller stops the iteration, the generation is aborted. Raises `ModelFailed`.
        """
        streams = [_ChoiceStream(served, output, i, options) for i in range(output.request.copies)]
        event = asyncio.Event()
        self._events[output] = event
        try:
            while not _all_closed(streams):
                if not output.done:
                    await event.wait()
                event.clear()
                if output.error:
                    reason = str(output.error) or type(output.error).__name__
                    kind = OutOfMemory if isinstance(output.error, DeviceFull) else ModelFailed
                    raise kind(f"{served.name} could not go on: {reason}") from output.error
                for stream in streams:
                    for delta in stream.poll():
                        if delta.kind == "end" and _all_closed(streams):
                            delta = replace(delta, usage=_usage(served, output, streams))
                        yield delta
        finally:
            del self._events[output]
            self._record_end(served, output, streams)
            self.abort(served, [output])

    def _record_end(self, served: ServedModel, output: Answer, streams: Sequence[_ChoiceStream]) -> None:
        """Count an output that has ended, or was abandoned by its client, in the metrics."""
        if output.error:
            end = "failed"
        elif _all_closed(streams):
            end = streams[0].finish
        else:
            end = "left"
        self.metrics.ended(served, output, _usage(served, output, streams), end)

    def _notify(self, outputs: Sequence[Answer]) -> None:
        """Wake the streams of the outputs that have new tokens.

        Called on the engine's thread; the streams wait on the event loop.
        """
        self.loop.call_soon_threadsafe(self._set_events, outputs)

    def _set_events(self, outputs: Sequence[Answer]) -> None:
        for output in outputs:
            event = self._events.get(output)
            if event:
                event.set()


@dataclass
class _OpenDelta:
    """A delta under construction, to which more text and tokens may be added."""

    kind: str
    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)


class _ChoiceStream:
    """Turns the tokens of one choice into deltas.

    It decodes the tokens to text, separates the thought from the answer, and applies the stop strings.
    `index` is the number of the choice in its output.
    """

    def __init__(self, served: ServedModel, output: Answer, index: int, options: GenerationOptions):
        self.served = served
        self.output = output
        self.index = index
        self.choice = output.choices[index]
        self.detokenizer = IncrementalDetokenizer(served.tokenizer)
        self.parser = ReasoningParser(output.request.opened, options.stop, options.plain)
        self.next_token = 0
        self.reasoning_tokens = 0
        self.closed = False
        self.finish = ""

    def poll(self) -> list[Delta]:
        """Return the deltas of the tokens that were sampled since the last call.

        The last delta of a choice is of kind "end".
        """
        if self.closed:
            return []
        finish = self.choice.finish  # read before the length: no token is appended once it is set
        tokens = len(self.choice.tokens)
        deltas: list[_OpenDelta] = []
        while self.next_token < tokens and not self.parser.stopped:
            self._add_token(deltas)
        if finish and not self.parser.stopped:
            _extend(deltas, self.parser.parse(self.detokenizer.close()))
            _extend(deltas, self.parser.close())
        closed = [
            Delta(delta.kind, delta.text, delta.tokens, self.index, logprobs=tuple(delta.logprobs))
            for delta in deltas
        ]
        if finish or self.parser.stopped:
            closed.append(self._end(finish))
        return closed

    def _end(self, finish: str) -> Delta:
        """Close the stream and return its last delta.

        `finish` is the engine's reason for the end, empty if a stop string has ended the text; in that case
        the engine is told to stop sampling this choice.
        """
        self.closed = True
        self.choice.enough = True
        if not finish:
            self.served.scheduler.enough(self.choice)
        self.finish = "stop" if self.parser.stopped else finish
        return Delta("end", choice=self.index, finish=self.finish)

    def _add_token(self, deltas: list[_OpenDelta]) -> None:
        """Decode the next token and add it to the deltas.

        A token that contains a part of a `<think>` or `</think>` tag counts as a token of the thought.
        """
        index = self.next_token
        token = self.choice.tokens[index]
        logprobs = self._logprobs(index, token)
        kind_before = self.parser.kind
        text = self.detokenizer.read([token])
        parts = self.parser.parse(text) if text else []
        thinking = "thought" in (kind_before, self.parser.kind)
        self.next_token = index + 1
        self.reasoning_tokens += thinking
        delta = _last_of_kind(deltas, "thought" if thinking else "answer")
        delta.tokens += 1
        delta.logprobs += logprobs
        _extend(deltas, parts)

    def _logprobs(self, index: int, token: int) -> list[TokenLogprob]:
        """Return the log-probability of the token at `index` of the choice, in a list.

        The list is empty if the request does not ask for log-probabilities, and for the end-of-turn token.
        """
        if self.output.request.top is None or token == self.served.tokenizer.end_id:
            return []
        return [TokenLogprob(token, self.choice.logprobs[index], self.choice.tops[index])]


def _last_of_kind(deltas: list[_OpenDelta], kind: str) -> _OpenDelta:
    """Return the last of the deltas if it is of this kind, else append a new one and return that."""
    if not deltas or deltas[-1].kind != kind:
        deltas.append(_OpenDelta(kind))
    return deltas[-1]


def _extend(deltas: list[_OpenDelta], parts: Sequence[tuple[str, str]]) -> None:
    """Append parsed text, given as pairs (kind, text), to the deltas."""
    for kind, text in parts:
        _last_of_kind(deltas, kind).text += text


def _all_closed(streams: Sequence[_ChoiceStream]) -> bool:
    return all(stream.closed for stream in streams)


async def collect(deltas: AsyncIterator[Delta]) -> list[ChatOutput]:
    """Read a stream of deltas to its end, and return all of its choices as complete outputs."""
    parts: dict[tuple[int, str], list[Delta]] = {}
    ends: dict[int, Delta] = {}
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.kind == "end":
                ends[delta.choice] = delta
            else:
                parts.setdefault((delta.choice, delta.kind), []).append(delta)
    usage = next(end.usage for end in ends.values() if end.usage)
    outputs = []
    for choice in sorted(ends):
        answer, logprobs = _join(parts.get((choice, "answer"), []))
        thought, thought_logprobs = _join(parts.get((choice, "thought"), []))
        finish = ends[choice].finish
        outputs.append(ChatOutput(answer, thought, finish, usage, logprobs, thought_logprobs))
    return outputs


def _join(deltas: Sequence[Delta]) -> tuple[str, tuple[TokenLogprob, ...]]:
    """Return the joined text and the log-probabilities of deltas that are all of one kind."""
    text = "".join(delta.text for delta in deltas)
    logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
    return text, tuple(logprobs)


def _usage(served: ServedModel, output: Answer, streams: Sequence[_ChoiceStream]) -> Usage:
    """Return the tokens, the cost and the latency of an output so far, summed over all of its choices."""
    prompt_tokens = len(output.request.prompt)
    completion_tokens = sum(stream.next_token for stream in streams)
    reasoning_tokens = sum(stream.reasoning_tokens for stream in streams)
    cost = served.price.cost(prompt_tokens, completion_tokens) if served.price else None
    first = output.first or time.monotonic()
    return Usage(
        prompt_tokens,
        output.cached,
        completion_tokens,
        reasoning_tokens,
        cost,
        seconds_to_first=first - output.asked,
        seconds=time.monotonic() - output.asked,
    )


def _encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], keep_thoughts: bool
) -> tuple[np.ndarray, bool]:
    """Return the token ids [N] of a conversation, and True if the prompt ends with an open `<think>` tag."""
    turns = [_template_message(message, keep_thoughts) for message in messages]
    text = tokenizer.render(tokenizer.prompt_format.apply(turns))
    tokens_N = np.array(tokenizer.encode(text), dtype=np.int64)
    return tokens_N, text.rstrip().endswith(OPEN)


def _template_message(message: Mapping[str, Any], keep_thoughts: bool) -> Message:
    """Return a message as chat templates read it.

    With `keep_thoughts`, the thought is in `reasoning_content`; else it is left out. Clients send it as
    `reasoning_content`, as `reasoning`, or between tags inside the content.
    """
    content = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    if message["role"] == "assistant" and CLOSE in content:
        tagged, content, _ = split_thought(content)
        thought = thought or tagged
    rendered = Message(role=message["role"], content=content)
    if keep_thoughts and thought:
        return {**rendered, "reasoning_content": thought}
    return rendered
