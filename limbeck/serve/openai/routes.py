"""Routes of the OpenAI-compatible API: models, chat and text completions, health and metrics.

Shapes: N tokens of a prompt.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ...engine.request import Answer, QueueFull
from ...types import LimbeckError
from ..app_state import AppState
from ..service import ModelFailed, ModelUnavailable, OutOfMemory, Service, UnknownModel, collect
from ..types import ChatOutput, Delta, GenerationOptions, ServedModel, Usage
from .schema import (
    ChatRequest,
    CompletionRequest,
    ScoredToken,
    chat_logprobs,
    delta_of,
    message_of,
    text_logprobs,
    usage_of,
)

SEND_TIMEOUT_SECONDS = 60.0  # seconds; a client that accepts no data for this time is disconnected
ERROR_TYPES = {
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}  # by HTTP status; all others are the client's
API_PATHS = ("/v1", "/health", "/metrics")
CLIENT_CLOSED_REQUEST = 499  # nginx's HTTP status for a client that has disconnected; nobody receives it


class Route(APIRoute):
    """A FastAPI route that answers every error with a JSON object in the shape of OpenAI's errors."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        """Return FastAPI's handler, changed so that it turns every error into a response."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except (RequestValidationError, HTTPException, LimbeckError) as error:
                return _error_response(error)

        return handler


def _error_response(error: RequestValidationError | HTTPException | LimbeckError) -> Response:
    """Return the response to an error, with the HTTP status, message, parameter and code that fit it."""
    match error:
        case RequestValidationError():
            return error_response(400, *_first_mistake(error))
        case HTTPException():  # for instance a body that is not UTF-8, or an unknown path
            return error_response(error.status_code, str(error.detail), headers=error.headers)
        case QueueFull():
            headers = {"retry-after": str(error.retry_after)}
            return error_response(429, str(error), code="queue_full", headers=headers)
        case OutOfMemory():
            return error_response(503, str(error), code="out_of_memory")
        case ModelUnavailable():
            return error_response(503, str(error), "model", "model_unavailable")
        case ModelFailed():
            return error_response(500, str(error))
        case UnknownModel():
            return error_response(404, str(error), "model", "model_not_found")
    return error_response(400, str(error))


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an error in the shape of OpenAI's API.

    `param` names the request's parameter at fault, `code` is a machine-readable reason. Characters that
    cannot be encoded in UTF-8 (half a surrogate pair) are replaced.
    """
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    error = {
        "message": _printable(message),
        "type": kind,
        "param": _printable(param) if param else None,
        "code": code,
    }
    return JSONResponse({"error": error}, status, headers)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def add_error_handlers(app: FastAPI) -> None:
    """Make errors that no route of the API sees OpenAI's error objects too: an unknown path, a method that a
    path does not have, an exception that is a bug. Errors of the studio's pages stay as they are."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if _is_api(request):
            detail = str(error.detail)
            message = (
                f"{detail}: {request.method} {request.url.path}"
                if error.status_code in (404, 405)
                else detail
            )
            return error_response(error.status_code, message, headers=error.headers)
        return await http_exception_handler(request, error)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        if _is_api(request):
            closing = {"connection": "close"}  # the HTTP server closes it once the error is logged
            return error_response(500, f"the server failed: {type(error).__name__}", headers=closing)
        return PlainTextResponse("Internal Server Error", 500)


def _is_api(request: Request) -> bool:
    return request.url.path.startswith(API_PATHS)


def _first_mistake(error: RequestValidationError) -> tuple[str, str, str | None]:
    """Return the message, the parameter and the code of the first mistake in a request.

    For instance `messages.0.role: Input ...`, `messages.0.role` and None; the parameter is `body` if none is
    known. A parameter that the server does not know is told as `not supported: tools`.
    """
    first = error.errors()[0]
    path = "" if first["type"] == "json_invalid" else _parameter(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"not supported: {path}", path, "unsupported_parameter"
    message = f"{path}: {first['msg']}" if path else first["msg"]
    return message, path or "body", None


def _parameter(location: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in location if part != "body")


def api(state: AppState) -> APIRouter:
    """Return the router of the API over the models of the server."""
    router = APIRouter(route_class=Route)
    _add_status_routes(router, state.service)
    _add_generation_routes(router, state.service)
    return router


def _add_status_routes(router: APIRouter, service: Service) -> None:
    @router.get("/health")
    async def health() -> dict[str, str]:
        """Liveness check."""
        return {"status": "ok"}

    @router.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """All served models."""
        return {"object": "list", "data": [_model_info(model) for model in service.models.values()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One served model."""
        return _model_info(service.model(name))


def _add_generation_routes(router: APIRouter, service: Service) -> None:
    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The assistant's next turn, with its reasoning apart."""
        served = service.model(body.model)
        options = body.options(served)
        head = _head("chatcmpl", "chat.completion", served)
        messages = [turn.plain() for turn in body.messages]
        output = await service.submit_chat(served, messages, options, body.keep_reasoning)
        generation = _Generation(service, served, output, options)
        if body.stream:
            return Stream(_chat_chunks(generation, head, body.include_usage), generation.abort)
        outputs = await _unless_disconnected(request, collect(generation.stream()), generation.abort)
        if outputs is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        choices = [_chat_choice(generation, i, choice) for i, choice in enumerate(outputs)]
        return JSONResponse({**head, "choices": choices, "usage": usage_of([outputs[0].usage])})

    @router.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Completions of texts."""
        served = service.model(body.model)
        options = body.options()
        head = _head("cmpl", "text_completion", served)
        prompts = [await asyncio.to_thread(_encode_prompt, served, prompt) for prompt in body.prompts()]
        outputs = service.submit(served, [served.request(prompt, options) for prompt in prompts])
        completions = [
            _TextCompletion(_Generation(service, served, output, options), bool(body.echo))
            for output in outputs
        ]

        def abort() -> None:
            service.abort(served, outputs)

        if body.stream:
            return Stream(_text_chunks(completions, head, body.include_usage), abort)
        choices = await _unless_disconnected(request, _whole_texts(completions), abort)
        if choices is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        usage = usage_of([completion.usage for completion in completions])
        return JSONResponse({**head, "choices": choices, "usage": usage})


def _model_info(served: ServedModel) -> dict[str, Any]:
    """Return the entry of a model in the list of models."""
    info = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "limbeck",
        "max_model_len": served.config.max_positions,
    }
    if served.price:
        info["price"] = {"prompt": served.price.prompt, "completion": served.price.completion}
    return info


def _head(prefix: str, object_name: str, served: ServedModel) -> dict[str, Any]:
    """Return the fields that a response has in common with all its chunks: id, type, time and model.

    `prefix` begins the random id, and `object_name` is the value of the field `object`.
    """
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": object_name,
        "created": int(time.time()),
        "model": served.name,
    }


def _encode_prompt(served: ServedModel, prompt: str | list[int]) -> np.ndarray:
    """Return the token ids [N] of a prompt, which is a text or a list of token ids."""
    tokens = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return np.array(tokens, dtype=np.int64)


@dataclass(frozen=True)
class _Generation:
    """A submitted request: its service, its model, the engine's output, and the options of generation."""

    service: Service
    served: ServedModel
    output: Answer
    options: GenerationOptions

    @property
    def with_logprobs(self) -> bool:
        """True if the response includes log-probabilities."""
        return self.options.top_logprobs is not None

    def stream(self) -> AsyncIterator[Delta]:
        """Return an iterator over the deltas of all choices."""
        return self.service.stream(self.served, self.output, self.options)

    def abort(self) -> None:
        """Stop the generation if it is unfinished."""
        self.service.abort(self.served, [self.output])


# ---------------------------------------------------------------- chat completions


async def _chat_chunks(
    generation: _Generation, head: dict[str, Any], include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a streamed chat completion: the role of each choice, then the deltas.

    With `include_usage`, the last chunk holds the usage. `head` has the fields that all chunks share.
    """
    head = {**head, "object": "chat.completion.chunk"}
    for index in range(generation.options.n):
        delta = {"role": "assistant", "content": ""}
        yield {**head, "choices": [{"index": index, "delta": delta, "finish_reason": None}]}
    async with aclosing(generation.stream()) as deltas:
        async for delta in deltas:
            if delta.text or delta.logprobs or delta.finish:
                yield {**head, "choices": [_chunk_choice(generation, delta)]}
            if delta.usage and include_usage:
                yield {**head, "choices": [], "usage": usage_of([delta.usage])}


def _chunk_choice(generation: _Generation, delta: Delta) -> dict[str, Any]:
    """Return a delta as the only choice of a chunk of a chat completion."""
    choice = {
        "index": delta.choice,
        "delta": delta_of(delta.kind, delta.text) if delta.text else {},
        "finish_reason": delta.finish or None,
    }
    if generation.with_logprobs:
        if delta.kind == "thought":
            choice["logprobs"] = chat_logprobs(generation.served, (), delta.logprobs)
        else:
            choice["logprobs"] = chat_logprobs(generation.served, delta.logprobs, ())
    return choice


def _chat_choice(generation: _Generation, index: int, output: ChatOutput) -> dict[str, Any]:
    """Return one choice of a chat completion that is not streamed; `index` is its number."""
    logprobs = None
    if generation.with_logprobs:
        logprobs = chat_logprobs(generation.served, output.logprobs, output.thought_logprobs)
    return {
        "index": index,
        "message": message_of(output),
        "finish_reason": output.finish,
        "logprobs": logprobs,
    }


# ---------------------------------------------------------------- text completions


class _TextCompletion:
    """The text completion of one prompt, with `n` choices that are numbered from 0 within this prompt.

    With `echo`, the text of each choice begins with the prompt.
    """

    def __init__(self, generation: _Generation, echo: bool):
        self.generation = generation
        self.echo = echo
        self.prompt = ""
        if echo:
            self.prompt = generation.served.tokenizer.decode(generation.output.request.prompt)
        self.n = generation.options.n
        self.usage: Usage | None = None
        self.offsets = [len(self.prompt)] * self.n  # where each choice's next token begins in its text

    async def choices(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the parts of all choices, each as the choice of a chunk.

        With `echo`, the first part of each choice is the prompt.
        """
        echoed: set[int] = set()
        async with aclosing(self.generation.stream()) as deltas:
            async for delta in deltas:
                self.usage = delta.usage or self.usage
                if self.echo and delta.choice not in echoed:
                    echoed.add(delta.choice)
                    yield self._echo(delta.choice)
                if delta.text or delta.logprobs or delta.finish:
                    yield self._continue(delta)

    def _echo(self, index: int) -> dict[str, Any]:
        """Return the prompt as the first part of the choice `index`.

        Its log-probabilities are known once the prompt has been processed, which must have happened.
        """
        return self._choice(index, self.prompt, self._scored_prompt(), 0)

    def _scored_prompt(self) -> list[ScoredToken]:
        """Return the prompt's tokens with log-probabilities, None for the first token.

        Empty if the request did not ask for log-probabilities.
        """
        if not self.generation.with_logprobs:
            return []
        output = self.generation.output
        logprobs = [None, *output.prompt_logprobs]
        tops = [(), *output.prompt_tops]
        return [
            (int(token), logprob, top)
            for token, logprob, top in zip(output.request.prompt, logprobs, tops, strict=True)
        ]

    def _continue(self, delta: Delta) -> dict[str, Any]:
        """Return a delta as the next part of its choice."""
        index = delta.choice
        tokens = [(scored.token, scored.logprob, scored.top) for scored in delta.logprobs]
        choice = self._choice(index, delta.text, tokens, self.offsets[index], delta.finish or None)
        tokenizer = self.generation.served.tokenizer
        self.offsets[index] += sum(len(tokenizer.label(token)) for token, _, _ in tokens)
        return choice

    def _choice(
        self, index: int, text: str, tokens: Sequence[ScoredToken], offset: int, finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if self.generation.with_logprobs:
            logprobs = text_logprobs(self.generation.served, tokens, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def _text_chunks(
    completions: Sequence[_TextCompletion], head: dict[str, Any], include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a streamed text completion, one prompt after the other.

    Choices are numbered over all prompts. With `include_usage`, the last chunk holds the usage. `head` has
    the fields that all chunks share.
    """
    for i, completion in enumerate(completions):
        async with aclosing(completion.choices()) as choices:
            async for choice in choices:
                index = i * completion.n + choice["index"]
                yield {**head, "choices": [{**choice, "index": index}]}
    if include_usage:
        usage = usage_of([completion.usage for completion in completions])
        yield {**head, "choices": [], "usage": usage}


async def _whole_texts(completions: Sequence[_TextCompletion]) -> list[dict[str, Any]]:
    """Return the complete choices of all prompts in order. The prompts are completed concurrently."""
    wholes = [_whole_text(completion, i * completion.n) for i, completion in enumerate(completions)]
    choices: list[dict[str, Any]] = []
    for whole in await asyncio.gather(*wholes):
        choices += whole
    return choices


async def _whole_text(completion: _TextCompletion, first_index: int) -> list[dict[str, Any]]:
    """Return the complete choices of one prompt, numbered from `first_index`."""
    choices: list[dict[str, Any]] = [
        {"index": first_index + i, "text": "", "logprobs": None} for i in range(completion.n)
    ]
    async with aclosing(completion.choices()) as parts:
        async for part in parts:
            choice = choices[part["index"]]
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            choice["logprobs"] = _joined_logprobs(choice["logprobs"], part["logprobs"])
    return choices


def _joined_logprobs(
    before: dict[str, list[Any]] | None, new: dict[str, list[Any]] | None
) -> dict[str, list[Any]] | None:
    """Return the log-probabilities of a choice so far (`before`) extended by those of its next part.

    Both are objects of parallel lists, or None if the part has none.
    """
    if not new:
        return before
    if not before:
        return new
    return {key: before[key] + new[key] for key in before}


# ---------------------------------------------------------------- responses


class Stream(Response):
    """A response that sends chunks as server-sent events.

    It ends after the last chunk or when the client disconnects. `abort` is called in both cases; it stops the
    generation if that is unfinished.
    """

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], abort: Callable[[], None]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.chunks = chunks
        self.abort = abort

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await _first_of(self._send_events(send), _disconnected(receive))
        except (OSError, TimeoutError):
            pass  # the client has disconnected
        finally:
            self.abort()

    async def _send_events(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for body in self._events():
            async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        """Yield the chunks as server-sent events, then an error if one occurred, then `[DONE]`."""
        try:
            async with aclosing(self.chunks) as chunks:
                async for chunk in chunks:
                    yield event(chunk)
        except LimbeckError as error:
            failure = {"message": str(error), "type": "server_error", "param": None, "code": None}
            yield event({"error": failure})
        yield b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """Return one server-sent event whose data is a JSON object. JSON text contains no line breaks."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


async def _unless_disconnected(request: Request, work: Awaitable[Any], abort: Callable[[], None]) -> Any:
    """Return the result of `work`, or None if the client disconnects first.

    `abort` is called in both cases; it stops the generation if that is unfinished.
    """
    try:
        return await _first_of(work, _disconnected(request.receive))
    finally:
        abort()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has disconnected."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _first_of(work: Awaitable[Any], other: Awaitable[None]) -> Any:
    """Return the result of `work`, or None if `other` ends first; the one that is unfinished is cancelled."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(other)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0] in done else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
