"""Chat: conversations that live on the server, each at an address of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, HTTPException, Path, Request
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.sse import EventSourceResponse
from markupsafe import Markup
from pydantic import AfterValidator

from ..app_state import AppState, person
from ..chat_replies import Replies
from ..conversations import Answer, Conversation, Conversations, Meter, Settings
from ..markdown_stream import html, pages
from ..pages import language_of, render, say
from ..transcript import as_json, as_markdown

LONGEST = 200_000  # characters of a question
TURNS = 20  # shown at first; earlier ones on demand
LAST = 2**63 - 1  # SQLite's largest number
WARMEST, DEEPEST = 2.0, 1_000_000

Number = Annotated[int, Path(ge=0, le=LAST)]
Chosen = Annotated[int, Form(ge=0, le=LAST)]
Text = Annotated[
    str, Form(min_length=1, max_length=LONGEST), AfterValidator(lambda text: text.replace("\r\n", "\n"))
]  # as forms send it


def routes(site: AppState) -> APIRouter:
    """Everything under `/chat`."""
    shelf = Conversations(site.studio_folder / "chats.db")
    replies = Replies(shelf, site.service)

    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        yield
        await replies.stop(state="interrupted")

    router = APIRouter(prefix="/chat", include_in_schema=False, lifespan=life)
    desk = _Desk(site, shelf, replies)
    _reading(router, desk)
    _speaking(router, desk)
    _keeping(router, desk)
    return router


class _Desk:
    """What the routes share: the shelf, the answers being given, and who may do what."""

    def __init__(self, site: AppState, shelf: Conversations, replies: Replies):
        self.site, self.shelf, self.replies = site, shelf, replies

    def models(self) -> list[str]:
        return list(getattr(self.site.service, "models", {}))

    def read(self, request: Request, name: str) -> Conversation:
        """A conversation by its address; whoever has that may read it."""
        found = self.shelf.read(name)
        if found is None:
            raise HTTPException(404, say(language_of(request), "site.lost"))
        return found

    def own(self, request: Request, name: str, quiet: bool = False) -> Conversation:
        """One's own conversation, and with `quiet` one in which nobody is answering."""
        found = self.read(request, name)
        if not mine(request, found):
            raise HTTPException(403, say(language_of(request), "chat.not_yours"))
        if quiet and self.replies.running(name):
            raise HTTPException(409, say(language_of(request), "chat.busy"))
        return found

    def answer(self, request: Request, name: str, number: Number) -> Answer:
        found = self.shelf.answer(number)
        if found is None or found[0] != name:
            raise HTTPException(404, say(language_of(request), "site.lost"))
        return found[1]

    def begin(self, name: str, numbers: list[int], models: tuple[str, ...], settings: Settings) -> None:
        for number, model in zip(numbers, models, strict=True):
            self.replies.begin(name, number, model, settings.temperature, settings.budget)

    async def rest(self, request: Request, name: str, turn: int | None) -> Response:
        """To a page's script the turns from one on (None: all), to a browser without scripts the way back to the page."""
        if "hx-request" not in request.headers:
            return RedirectResponse(f"/chat/{name}", 303)
        return await asyncio.to_thread(self.show, request, name, turn)

    def show(self, request: Request, name: str, turn: int | None = None) -> Response:
        talk = self.read(request, name)
        turns = [
            one for one in talk.turns if turn is None or one.id >= turn
        ]  # along a branch the numbers grow
        return _page(request, self, "chat_turns.html.jinja", talk=talk, turns=turns)


def mine(request: Request, talk: Conversation) -> bool:
    """Whether somebody may go on with a conversation: those without a name are everybody's."""
    return talk.owner in ("", _name(request))


def wished(
    model: str = Form("", max_length=200), beside: str = Form("", max_length=200), temperature: float = Form(0.6, ge=0, le=WARMEST),
    budget: int | None = Form(None, ge=0, le=DEEPEST),
) -> Settings | None:  # fmt: skip
    """What a form says about who answers and how; None where it says nothing."""
    return Settings((model, beside) if beside else (model,), temperature, budget) if model else None


Wished = Annotated[Settings | None, Depends(wished)]


def _reading(router: APIRouter, desk: _Desk) -> None:
    @router.get("")
    def home(request: Request, before: float = float("inf")) -> Response:
        return _page(
            request, desk, "chat_home.html.jinja", before=before, settings=Settings(tuple(desk.models()[:1]))
        )

    @router.get("/{name}")
    def talk(request: Request, name: str, turns: int = TURNS) -> Response:
        if "hx-request" in request.headers:
            return desk.show(request, name)
        found = desk.read(request, name)
        shown = found.turns[-turns:] if turns > 0 else found.turns
        return _page(
            request,
            desk,
            "chat.html.jinja",
            talk=found,
            turns=shown,
            earlier=len(found.turns) - len(shown),
            settings=found.settings,
        )

    @router.get("/{name}/answers/{number}")
    def answer(request: Request, name: str, number: Number) -> Response:
        return _page(
            request,
            desk,
            "chat_answer.html.jinja",
            talk=desk.read(request, name),
            answer=desk.answer(request, name, number),
        )

    @router.get("/{name}/answers/{number}/text")
    def text(request: Request, name: str, number: Number) -> Response:
        return PlainTextResponse(desk.answer(request, name, number).content)

    @router.get("/{name}/answers/{number}/{part}")
    def leaf(request: Request, name: str, number: Number, part: str, page: int = 1) -> Response:
        answer = desk.answer(request, name, number)
        said = {"thought": answer.thought, "answer": answer.content}.get(part)
        if said is None:
            raise HTTPException(404, say(language_of(request), "site.lost"))
        template = "chat_leaf.html.jinja" if "hx-request" in request.headers else "chat_leaf_page.html.jinja"
        return _page(
            request,
            desk,
            template,
            talk=desk.read(request, name),
            answer=answer,
            part=part,
            said=said,
            page=page,
        )

    @router.get("/{name}/follow", response_class=EventSourceResponse)
    async def follow(request: Request, name: str, after: int = -1) -> AsyncIterator[Any]:
        """What grows in a conversation until nothing does; first of all, whether it is another than the page's version."""
        if await asyncio.to_thread(desk.shelf.version, name) != after:
            yield {"changed": True}
        async for event in desk.replies.follow(name):
            if event.get("ended"):
                yield {**event, "version": await asyncio.to_thread(desk.shelf.version, name)}
            else:
                yield {**event, "meter": _pace(language_of(request), event["meter"], event["thinking"])}

    @router.get("/{name}/export.md")
    def markdown(request: Request, name: str) -> Response:
        words = partial(say, language_of(request))
        return _file(
            PlainTextResponse(as_markdown(desk.read(request, name), words), media_type="text/markdown"), "md"
        )

    @router.get("/{name}/export.json")
    def export(request: Request, name: str) -> Response:
        return _file(JSONResponse(as_json(desk.read(request, name))), "json")


def _speaking(router: APIRouter, desk: _Desk) -> None:
    """Whatever makes a model answer. These run in the event loop, where answers live, and read the shelf in threads."""

    def served(request: Request, settings: Settings | None, before: Settings | None = None) -> Settings:
        """What is wished, or else what the conversation had: if those models are served."""
        chosen = settings or before
        if chosen is None or not set(chosen.models) <= set(desk.models()):
            raise HTTPException(400, say(language_of(request), "chat.no_such_model"))
        return chosen

    @router.post("")
    async def start(request: Request, text: Text, settings: Wished) -> Response:
        settings = served(request, settings)
        name = await asyncio.to_thread(desk.shelf.start, _name(request), settings)
        desk.begin(
            name,
            await asyncio.to_thread(desk.shelf.ask, name, None, text, settings),
            settings.models,
            settings,
        )
        return RedirectResponse(f"/chat/{name}", 303)

    @router.post("/{name}/say")
    async def ask(
        request: Request, name: str, text: Text, settings: Wished, parent: int | None = Form(None)
    ) -> Response:
        talk = await asyncio.to_thread(desk.own, request, name, True)
        settings = served(request, settings, talk.settings)
        if parent is not None and parent not in {turn.id for turn in talk.turns}:
            raise HTTPException(409, say(language_of(request), "chat.elsewhere"))
        numbers = await asyncio.to_thread(desk.shelf.ask, name, parent, text, settings)
        desk.begin(name, numbers, settings.models, settings)
        return await desk.rest(request, name, (parent or 0) + 1)

    @router.post("/{name}/edit")
    async def edit(request: Request, name: str, text: Text, settings: Wished, turn: Chosen) -> Response:
        talk = await asyncio.to_thread(desk.own, request, name, True)
        settings = served(request, settings, talk.settings)
        try:
            numbers = await asyncio.to_thread(desk.shelf.edit, name, turn, text, settings)
        except KeyError:
            raise HTTPException(404, say(language_of(request), "site.lost")) from None
        desk.begin(name, numbers, settings.models, settings)
        return await desk.rest(request, name, turn)

    @router.post("/{name}/again")
    async def again(request: Request, name: str, settings: Wished, answer: Chosen) -> Response:
        talk = await asyncio.to_thread(desk.own, request, name, True)
        old = await asyncio.to_thread(desk.answer, request, name, answer)
        settings = served(
            request,
            Settings(
                (old.model,), (settings or talk.settings).temperature, (settings or talk.settings).budget
            ),
        )
        number = await asyncio.to_thread(desk.shelf.again, name, old, settings)
        desk.begin(name, [number], settings.models, settings)
        return await desk.rest(request, name, old.turn)

    @router.post("/{name}/stop")
    async def stop(request: Request, name: str) -> Response:
        await asyncio.to_thread(desk.own, request, name)
        await desk.replies.stop(name)
        return await desk.rest(request, name, None)


def _keeping(router: APIRouter, desk: _Desk) -> None:
    @router.post("/{name}/show")
    async def show(
        request: Request,
        name: str,
        turn: int | None = Form(None, le=LAST),
        answer: int | None = Form(None, le=LAST),
    ) -> Response:
        await asyncio.to_thread(desk.own, request, name, True)
        of = turn if answer is None else (await asyncio.to_thread(desk.answer, request, name, answer)).turn
        await asyncio.to_thread(desk.shelf.show, name, turn, answer)
        return await desk.rest(request, name, of)

    @router.post("/{name}/rename")
    def rename(request: Request, name: str, title: str = Form(min_length=1, max_length=200)) -> Response:
        desk.own(request, name)
        desk.shelf.rename(name, " ".join(title.split()))
        return RedirectResponse(f"/chat/{name}", 303)

    @router.post("/{name}/delete")
    async def delete(request: Request, name: str) -> Response:
        await asyncio.to_thread(desk.own, request, name)
        await desk.replies.stop(name)
        await asyncio.to_thread(desk.shelf.delete, name)
        return RedirectResponse("/chat", 303)


def _page(request: Request, desk: _Desk, template: str, **values: Any) -> Response:
    """A page or a part of one; each knows who may do what, and how numbers are said."""
    words = partial(say, language_of(request))
    talk = values.get("talk")
    before = values.pop("before", float("inf"))
    listed = [] if "hx-request" in request.headers else desk.shelf.listed(_name(request), before)
    return render(
        request,
        template,
        models=desk.models(),
        listed=listed,
        own=talk is None or mine(request, talk),
        pages=pages,
        html=lambda page: Markup(html(page)),
        meter=partial(_meter, words),
        **{"thinks": False, **values},
    )


def _meter(words: Any, meter: Meter, thought: bool) -> str:
    """What a thought, or a whole answer, took."""
    tokens, seconds = (
        (meter.thought_tokens, meter.thought_seconds) if thought else (meter.tokens, meter.seconds)
    )
    return " · ".join([words("chat.tokens", count=f"{tokens:,}"), duration(words, seconds)])


def _pace(language: str, meter: Meter, thinking: bool) -> dict[str, str]:
    """A running answer's figures."""
    words = partial(say, language)
    whole = _meter(words, meter, False)
    if not meter.tokens:
        phase = f"{words('chat.waiting')} {duration(words, meter.seconds)}"
    else:
        phase = words("chat.thinking") if thinking else f"{words('chat.answering')} {whole}"
    return {"phase": phase, "thought": _meter(words, meter, True)}


def duration(words: Any, seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return words("chat.seconds", count=f"{seconds:.1f}")
    return words("chat.minutes", minutes=int(seconds // 60), seconds=int(seconds % 60))


def _name(request: Request) -> str:
    who = person(request)
    return who.name if who else ""


def _file(answer: Response, ending: str) -> Response:
    """To be kept, not shown."""
    answer.headers["content-disposition"] = f'attachment; filename="conversation.{ending}"'
    return answer
