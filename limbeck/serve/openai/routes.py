"""The API that clients of OpenAI's know: models, chat completions, completions; and what watches the server."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ...engine.request import Answer, Full
from ...types import LimbeckError
from ..app_state import AppState
from ..service import GenerationOptions, ModelFailed, Piece, Served, Service, UnknownModel, gathered
from .schema import (
    ChatRequest,
    CompletionRequest,
    chat_logprobs,
    delta_of,
    message_of,
    text_logprobs,
    usage_of,
)

SEND_SECONDS = 60.0  # a reader who takes nothing for so long is gone
GONE = 499  # nobody is there any more to read it


class Route(APIRoute):
    """Mistakes leave in the shape that clients of OpenAI's API read."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return refusal(400, *_first_mistake(error))
            except HTTPException as error:  # a body that is not even text
                return refusal(error.status_code, str(error.detail))
            except Full as error:
                return refusal(
                    429, str(error), code="queue_full", headers={"retry-after": str(error.retry_after)}
                )
            except ModelFailed as error:
                return refusal(500, str(error))
            except UnknownModel as error:
                return refusal(404, str(error), "model", "model_not_found")
            except LimbeckError as error:
                return refusal(400, str(error))

        return handler


def refusal(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    where = param.encode("utf-8", "replace").decode() if param else None  # a key may be half a character
    message = message.encode("utf-8", "replace").decode()
    kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": where, "code": code}}, status, headers
    )


def _first_mistake(error: RequestValidationError) -> tuple[str, str]:
    """Where, and what: `messages.0.role: Input should be ...`."""
    first = error.errors()[0]
    where = (
        ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] != "json_invalid"
        else ""
    )
    return (f"{where}: {first['msg']}" if where else first["msg"]), where or "body"


def api(site: AppState) -> APIRouter:
    """The routes over the models of a site."""
    service: Service = site.service
    router = APIRouter(route_class=Route)

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server lives."""
        return {"status": "ok"}

    @router.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """All that are served."""
        return {"object": "list", "data": [_model(one) for one in service.models.values()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return _model(service.model(name))

    @router.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """The assistant's next turn, its thought apart."""
        served = service.model(asked.model)
        wish, head = asked.wish(served), _head("chatcmpl", "chat.completion", served)
        answer = await service.ask(
            served, [turn.plain() for turn in asked.messages], wish, asked.keep_reasoning
        )
        if asked.stream:
            return Stream(
                _chat_chunks(service, served, answer, wish, head, asked.tells_usage),
                lambda: service.forget(served, [answer]),
            )
        answered = await _unless_gone(
            request, gathered(service.follow(served, answer, wish)), lambda: service.forget(served, [answer])
        )
        if answered is None:
            return Response(status_code=GONE)
        choices = [
            {
                "index": i,
                "message": message_of(one),
                "finish_reason": one.finish,
                "logprobs": chat_logprobs(served, one.said, one.thought_said)
                if wish.top is not None
                else None,
            }
            for i, one in enumerate(answered)
        ]
        return JSONResponse({**head, "choices": choices, "usage": usage_of([answered[0].usage])})

    @router.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """How a text goes on."""
        served = service.model(asked.model)
        wish, head = asked.wish(served), _head("cmpl", "text_completion", served)
        prompts = [await asyncio.to_thread(_ids, served, prompt) for prompt in asked.prompts()]
        answers = service.submit(served, [served.request(prompt, wish) for prompt in prompts])
        texts = [_Text(served, answer, wish, bool(asked.echo)) for answer in answers]

        def forget() -> None:
            service.forget(served, answers)

        if asked.stream:
            return Stream(_text_chunks(service, texts, head, asked.tells_usage), forget)
        choices = await _unless_gone(request, _whole_texts(service, texts), forget)
        if choices is None:
            return Response(status_code=GONE)
        return JSONResponse({**head, "choices": choices, "usage": usage_of([text.usage for text in texts])})

    return router


def _model(served: Served) -> dict[str, Any]:
    price = (
        {"price": {"prompt": served.price.prompt, "completion": served.price.completion}}
        if served.price
        else {}
    )
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "limbeck",
        "max_model_len": served.config.max_positions,
        **price,
    }


def _head(kind: str, thing: str, served: Served) -> dict[str, Any]:
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "object": thing,
        "created": int(time.time()),
        "model": served.name,
    }


def _ids(served: Served, prompt: str | list[int]) -> np.ndarray:
    return np.array(served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, dtype=np.int64)


# ---------------------------------------------------------------- chat, piece by piece


async def _chat_chunks(
    service: Service,
    served: Served,
    answer: Answer,
    wish: GenerationOptions,
    head: dict[str, Any],
    tells_usage: bool,
) -> AsyncIterator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}
    for choice in range(wish.n):
        yield {
            **head,
            "choices": [
                {"index": choice, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            ],
        }
    async with aclosing(service.follow(served, answer, wish)) as pieces:
        async for piece in pieces:
            if piece.text or piece.said or piece.finish:
                yield {**head, "choices": [_chat_choice(served, piece, wish)]}
            if piece.usage and tells_usage:
                yield {**head, "choices": [], "usage": usage_of([piece.usage])}


def _chat_choice(served: Served, piece: Piece, wish: GenerationOptions) -> dict[str, Any]:
    delta = delta_of(piece.kind, piece.text) if piece.text else {}
    choice = {"index": piece.choice, "delta": delta, "finish_reason": piece.finish or None}
    if wish.top is None:
        return choice
    thinks = piece.kind == "thought"
    return {
        **choice,
        "logprobs": chat_logprobs(served, () if thinks else piece.said, piece.said if thinks else ()),
    }


# ---------------------------------------------------------------- texts


class _Text:
    """One prompt of a request and how it goes on."""

    def __init__(self, served: Served, answer: Answer, wish: GenerationOptions, echo: bool):
        self.served, self.answer, self.wish, self.echo = served, answer, wish, echo
        self.prompt = served.tokenizer.decode(answer.request.prompt) if echo else ""
        self.usage: Any = None
        self.offset = [len(self.prompt)] * wish.n

    def begun(self, choice: int) -> dict[str, Any]:
        """What stands before the first new token: with `echo` the prompt, known only once it has been read."""
        said = []
        if self.echo and self.wish.top is not None:
            scored = [(None, ()), *zip(self.answer.prompt_logprobs, self.answer.prompt_tops, strict=True)]
            said = [
                (int(token), *score) for token, score in zip(self.answer.request.prompt, scored, strict=True)
            ]
        return self._choice(choice, self.prompt, said, 0, None)

    def went_on(self, piece: Piece) -> dict[str, Any]:
        said = [(one.token, one.logprob, one.top) for one in piece.said]
        choice = self._choice(piece.choice, piece.text, said, self.offset[piece.choice], piece.finish or None)
        self.offset[piece.choice] += sum(len(self.served.tokenizer.label(one.token)) for one in piece.said)
        return choice

    def _choice(self, choice: int, text: str, said: list, offset: int, finish: str | None) -> dict[str, Any]:
        told = text_logprobs(self.served, said, offset) if self.wish.top is not None else None
        return {"index": choice, "text": text, "logprobs": told, "finish_reason": finish}

    async def pieces(self, service: Service) -> AsyncIterator[dict[str, Any]]:
        begun: set[int] = set()
        async with aclosing(service.follow(self.served, self.answer, self.wish)) as pieces:
            async for piece in pieces:
                self.usage = piece.usage or self.usage
                if self.echo and piece.choice not in begun:
                    begun.add(piece.choice)
                    yield self.begun(piece.choice)
                if piece.text or piece.said or piece.finish:
                    yield self.went_on(piece)


async def _text_chunks(
    service: Service, texts: Sequence[_Text], head: dict[str, Any], tells_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    for i, text in enumerate(texts):
        async with aclosing(text.pieces(service)) as choices:
            async for choice in choices:
                yield {**head, "choices": [{**choice, "index": i * text.wish.n + choice["index"]}]}
    if tells_usage:
        yield {**head, "choices": [], "usage": usage_of([text.usage for text in texts])}


async def _whole_texts(service: Service, texts: Sequence[_Text]) -> list[dict[str, Any]]:
    async def whole(i: int, text: _Text) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = [
            {"index": i * text.wish.n + c, "text": "", "logprobs": None} for c in range(text.wish.n)
        ]
        async with aclosing(text.pieces(service)) as parts:
            async for part in parts:
                choice = choices[part["index"]]
                choice["text"] += part["text"]
                choice["finish_reason"] = part["finish_reason"]
                told = choice["logprobs"] or {key: [] for key in part["logprobs"] or ()}
                choice["logprobs"] = {key: told[key] + part["logprobs"][key] for key in told} or None
        return choices

    return [
        choice
        for choices in await asyncio.gather(*(whole(i, text) for i, text in enumerate(texts)))
        for choice in choices
    ]


# ---------------------------------------------------------------- the wire


class Stream(Response):
    """Server-sent events, until the last chunk or until nobody reads them; `forget` is called in every case."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], forget: Callable[[], None]):
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self.chunks, self.forget = chunks, forget

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def work() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events():
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _first_of(work(), _disconnected(receive))
        except (OSError, TimeoutError):
            pass  # whoever read it has gone
        finally:
            self.forget()

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async with aclosing(self.chunks) as chunks:
                async for chunk in chunks:
                    yield event(chunk)
        except LimbeckError as error:
            yield event(
                {"error": {"message": str(error), "type": "server_error", "param": None, "code": None}}
            )
        yield b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event; JSON has no line breaks of its own."""
    return (
        b"data: "
        + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        + b"\n\n"
    )


async def _unless_gone(request: Request, work: Awaitable[Any], forget: Callable[[], None]) -> Any:
    """The work's result; None if nobody waits for it any more."""
    try:
        return await _first_of(work, _disconnected(request.receive))
    finally:
        forget()


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_of(work: Awaitable[Any], other: Awaitable[None]) -> Any:
    """The work's result, or None if the other came first; what is left is ended."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(other)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0] in done else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
