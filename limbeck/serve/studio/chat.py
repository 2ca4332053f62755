"""The chat's pages: conversations that are stored on the server, each at an address of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
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
from ..markdown_stream import render_page, split_pages
from ..model_problems import ModelProblems, problems_of
from ..pages import is_fragment, language_of, render, say
from ..transcript import as_json, as_markdown

MAX_QUESTION = 200_000  # characters
TURNS_SHOWN = 20  # turns at first; earlier ones on demand
MAX_ID = 2**63 - 1  # SQLite's largest integer
MAX_TEMPERATURE = 2.0  # no unit
MAX_BUDGET = 1_000_000  # tokens
MAX_SYSTEM = 20_000  # characters of a system prompt
WORDS_SHOWN = 6  # unknown words of a question that the note below it lists


def _unix_lines(text: str) -> str:
    """Return the text with LF line ends; HTML forms send CRLF."""
    return text.replace("\r\n", "\n")


PathId = Annotated[int, Path(ge=0, le=MAX_ID)]
FormId = Annotated[int, Form(ge=0, le=MAX_ID)]
Text = Annotated[str, Form(min_length=1, max_length=MAX_QUESTION), AfterValidator(_unix_lines)]
Phrases = Callable[..., str]


def routes(state: AppState) -> APIRouter:
    """Return the router of all pages under `/chat`."""
    store = Conversations(state.studio_folder / "chats.db")
    pages = ChatPages(state, store, Replies(store, state.service))

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await pages.replies.stop(state="interrupted")

    router = APIRouter(prefix="/chat", include_in_schema=False, lifespan=lifespan)
    _add_reading(router, pages)
    _add_answers(router, pages)
    _add_exports(router, pages)
    _add_questions(router, pages)
    _add_regeneration(router, pages)
    _add_management(router, pages)
    return router


class ChatPages:
    """What the routes of the chat share: the stored conversations, the running replies, and access checks.

    `name` is everywhere the id of a conversation, as in its address.
    """

    def __init__(self, state: AppState, store: Conversations, replies: Replies):
        self.state = state
        self.store = store
        self.replies = replies

    def read(self, request: Request, name: str) -> Conversation:
        """Return a conversation; everybody who knows its address may read it.

        Raises an HTTPException with status 404 for an unknown id.
        """
        conversation = self.store.read(name)
        if conversation is None:
            raise _error(request, 404, "site.lost")
        return conversation

    def read_own(self, request: Request, name: str) -> Conversation:
        """Return a conversation that the person of the request may continue.

        Raises an HTTPException with status 403 if it is another person's.
        """
        conversation = self.read(request, name)
        if not is_own(request, conversation):
            raise _error(request, 403, "chat.not_yours")
        return conversation

    def read_idle(self, request: Request, name: str) -> Conversation:
        """Return a conversation that the person may continue and in which no reply is running.

        Raises an HTTPException with status 409 while a reply is running.
        """
        conversation = self.read_own(request, name)
        if self.replies.running(name):
            raise _error(request, 409, "chat.busy")
        return conversation

    def answer(self, request: Request, name: str, number: int) -> Answer:
        """Return the answer with the id `number`.

        Raises an HTTPException with status 404 if the conversation has no such answer.
        """
        owner_and_answer = self.store.answer(number)
        if owner_and_answer is None or owner_and_answer[0] != name:
            raise _error(request, 404, "site.lost")
        return owner_and_answer[1]

    def served_settings(
        self, request: Request, settings: Settings | None, default: Settings | None = None
    ) -> Settings:
        """Return the settings from the form, or `default` if the form has none.

        Raises an HTTPException with status 400 if there are neither, or if one of the models is not served.
        """
        settings = settings or default
        if settings is None or not set(settings.models) <= set(self.state.model_names()):
            raise _error(request, 400, "chat.no_such_model")
        return settings

    def examples(self, model: str) -> tuple[str, ...]:
        """Return example questions of a served model: held-out problems of the kinds that it was trained on.
        Empty where these are not known."""
        problems = self._problems(model)
        return problems.examples if problems else ()

    def unlike(self, phrases: Phrases, model: str, question: str) -> str:
        """Return the note that a question is unlike all problems that a model was trained on; empty if it is
        like them, or if they are not known."""
        problems = self._problems(model)
        words = problems.unknown_words(question) if problems else []
        if not words:
            return ""
        key = "chat.unlike_pretrained" if problems.pretrained else "chat.unlike"
        shown = [word for word in words if word.isalpha()] or words  # signs only where there is nothing else
        return phrases(key, model=model, words=", ".join(shown[:WORDS_SHOWN]))

    def _problems(self, model: str) -> ModelProblems | None:
        served = self.state.service.models.get(model)
        folder = getattr(served, "folder", None)
        return problems_of(folder, self.state.runs) if folder else None

    def begin(self, name: str, answers: Sequence[int], settings: Settings) -> None:
        """Start the generation of answers.

        `answers` are their ids, in the order of the models in the settings.
        """
        for number, model in zip(answers, settings.models, strict=True):
            self.replies.begin(name, number, model, settings)

    async def respond(self, request: Request, name: str, turn: int | None) -> Response:
        """Return the turns from the id `turn` on (None: all) if htmx asks for them.

        A browser without scripts gets a redirect to the page of the conversation.
        """
        if not is_fragment(request):
            return RedirectResponse(f"/chat/{name}", 303)
        return await asyncio.to_thread(self.turns, request, name, turn)

    def turns(self, request: Request, name: str, first: int | None = None) -> Response:
        """Render the turns on view whose ids are at least `first`, or all of them if it is None.

        Later turns of a branch have greater ids, so these are the turn `first` and all turns after it.
        """
        conversation = self.read(request, name)
        turns = [turn for turn in conversation.turns if first is None or turn.id >= first]
        return _page(request, self, "chat_turns.html.jinja", talk=conversation, turns=turns)


def is_own(request: Request, conversation: Conversation) -> bool:
    """True if the person may continue a conversation: it is their own, or has no owner."""
    return conversation.owner in ("", _user_name(request))


def form_settings(
    model: Annotated[str, Form(max_length=200)] = "",
    beside: Annotated[str, Form(max_length=200)] = "",
    temperature: Annotated[float, Form(ge=0, le=MAX_TEMPERATURE)] = 0.6,
    budget: Annotated[int | None, Form(ge=0, le=MAX_BUDGET)] = None,
    top_p: Annotated[float, Form(gt=0, le=1)] = 0.95,
    max_tokens: Annotated[int | None, Form(ge=1, le=MAX_BUDGET)] = None,
    system: Annotated[str, Form(max_length=MAX_SYSTEM)] = "",
) -> Settings | None:
    """Return the settings in a form; None if it names no model.

    `beside` is the model that answers side by side with `model`, and `budget` the limit of the thought in
    tokens.
    """
    if not model:
        return None
    models = (model, beside) if beside else (model,)
    return Settings(models, temperature, budget, top_p, max_tokens, _unix_lines(system).strip())


FormSettings = Annotated[Settings | None, Depends(form_settings)]


def _error(request: Request, status: int, phrase: str) -> HTTPException:
    return HTTPException(status, say(language_of(request), phrase))


# ---------------------------------------------------------------- reading


def _add_reading(router: APIRouter, pages: ChatPages) -> None:
    @router.get("")
    def home(
        request: Request, before: float = float("inf"), model: str = "", example: int | None = None
    ) -> Response:
        """The page of a new conversation. `example` is the number of the example question of `model` that is
        put into the form, for which a link on this page asks."""
        names = pages.state.model_names()
        chosen = [model] if model in names else names[:1]
        examples = {name: pages.examples(name) for name in names}
        offered = examples.get(model, ())
        question = offered[example] if example is not None and 0 <= example < len(offered) else ""
        return _page(
            request,
            pages,
            "chat_home.html.jinja",
            before=before,
            settings=Settings(tuple(chosen)),
            examples={name: some for name, some in examples.items() if some},
            question=question,
        )

    @router.get("/{name}")
    def show(request: Request, name: str, turns: int = TURNS_SHOWN) -> Response:
        if is_fragment(request):
            return pages.turns(request, name)
        conversation = pages.read(request, name)
        shown = conversation.turns[-turns:] if turns > 0 else conversation.turns
        return _page(
            request,
            pages,
            "chat.html.jinja",
            talk=conversation,
            turns=shown,
            earlier=len(conversation.turns) - len(shown),
            settings=conversation.settings,
        )

    @router.get("/{name}/follow", response_class=EventSourceResponse)
    async def follow(request: Request, name: str, after: int = -1) -> AsyncIterator[Any]:
        """Yield events of the running replies of a conversation.

        `after` is the version of the conversation that the page shows. If that is outdated, the first event
        is `changed`.
        """
        if await asyncio.to_thread(pages.store.version, name) != after:
            yield {"changed": True}
        async for event in pages.replies.follow(name):
            if event.get("ended"):
                yield {**event, "version": await asyncio.to_thread(pages.store.version, name)}
            else:
                figures = _running_figures(language_of(request), event["meter"], event["thinking"])
                yield {**event, "meter": figures}


def _add_answers(router: APIRouter, pages: ChatPages) -> None:
    @router.get("/{name}/answers/{number}")
    def answer(request: Request, name: str, number: PathId) -> Response:
        conversation = pages.read(request, name)
        shown = pages.answer(request, name, number)
        asked = next((turn.content for turn in conversation.turns if turn.id == shown.turn), "")
        return _page(request, pages, "chat_answer.html.jinja", talk=conversation, answer=shown, asked=asked)

    @router.get("/{name}/answers/{number}/text")
    def text(request: Request, name: str, number: PathId) -> Response:
        return PlainTextResponse(pages.answer(request, name, number).content)

    @router.get("/{name}/answers/{number}/{part}")
    def leaf(request: Request, name: str, number: PathId, part: str, page: int = 1) -> Response:
        answer = pages.answer(request, name, number)
        texts = {"thought": answer.thought, "answer": answer.content}
        if part not in texts:
            raise _error(request, 404, "site.lost")
        return _page(
            request,
            pages,
            "chat_leaf.html.jinja" if is_fragment(request) else "chat_leaf_page.html.jinja",
            talk=pages.read(request, name),
            answer=answer,
            part=part,
            said=texts[part],
            page=page,
        )


def _add_exports(router: APIRouter, pages: ChatPages) -> None:
    @router.get("/{name}/export.md")
    def markdown(request: Request, name: str) -> Response:
        text = as_markdown(pages.read(request, name), partial(say, language_of(request)))
        return _download(PlainTextResponse(text, media_type="text/markdown"), "md")

    @router.get("/{name}/export.json")
    def export(request: Request, name: str) -> Response:
        return _download(JSONResponse(as_json(pages.read(request, name))), "json")


def _download(response: Response, suffix: str) -> Response:
    """Mark a response for the browser to store as a file, whose name ends in `suffix`, and return it."""
    response.headers["content-disposition"] = f'attachment; filename="conversation.{suffix}"'
    return response


# ---------------------------------------------------------------- generation


def _add_questions(router: APIRouter, pages: ChatPages) -> None:
    """Add the routes that start replies to new or edited questions.

    They run on the event loop, as the replies do, and use the database in threads.
    """

    @router.post("")
    async def start(request: Request, text: Text, settings: FormSettings) -> Response:
        settings = pages.served_settings(request, settings)
        name = await asyncio.to_thread(pages.store.start, _user_name(request), settings)
        answers = await asyncio.to_thread(pages.store.ask, name, None, text, settings)
        pages.begin(name, answers, settings)
        return RedirectResponse(f"/chat/{name}", 303)

    @router.post("/{name}/say")
    async def ask(
        request: Request,
        name: str,
        text: Text,
        settings: FormSettings,
        parent: Annotated[int | None, Form()] = None,
    ) -> Response:
        conversation = await asyncio.to_thread(pages.read_idle, request, name)
        settings = pages.served_settings(request, settings, conversation.settings)
        if parent is not None and parent not in {turn.id for turn in conversation.turns}:
            raise _error(request, 409, "chat.elsewhere")
        answers = await asyncio.to_thread(pages.store.ask, name, parent, text, settings)
        pages.begin(name, answers, settings)
        return await pages.respond(request, name, (parent or 0) + 1)

    @router.post("/{name}/edit")
    async def edit(request: Request, name: str, text: Text, settings: FormSettings, turn: FormId) -> Response:
        conversation = await asyncio.to_thread(pages.read_idle, request, name)
        settings = pages.served_settings(request, settings, conversation.settings)
        try:
            answers = await asyncio.to_thread(pages.store.edit, name, turn, text, settings)
        except KeyError:
            raise _error(request, 404, "site.lost") from None
        pages.begin(name, answers, settings)
        return await pages.respond(request, name, turn)


def _add_regeneration(router: APIRouter, pages: ChatPages) -> None:
    @router.post("/{name}/again")
    async def again(request: Request, name: str, settings: FormSettings, answer: FormId) -> Response:
        conversation = await asyncio.to_thread(pages.read_idle, request, name)
        old = await asyncio.to_thread(pages.answer, request, name, answer)
        chosen = settings or conversation.settings
        same_model = replace(chosen, models=(old.model,))
        same_model = pages.served_settings(request, same_model)
        number = await asyncio.to_thread(pages.store.regenerate, name, old, same_model)
        pages.begin(name, [number], same_model)
        return await pages.respond(request, name, old.turn)

    @router.post("/{name}/stop")
    async def stop(request: Request, name: str) -> Response:
        await asyncio.to_thread(pages.read_own, request, name)
        await pages.replies.stop(name)
        return await pages.respond(request, name, None)


# ---------------------------------------------------------------- variants, title, deletion


def _add_management(router: APIRouter, pages: ChatPages) -> None:
    @router.post("/{name}/show")
    async def show(
        request: Request,
        name: str,
        turn: Annotated[int | None, Form(le=MAX_ID)] = None,
        answer: Annotated[int | None, Form(le=MAX_ID)] = None,
    ) -> Response:
        await asyncio.to_thread(pages.read_idle, request, name)
        first = turn
        if answer is not None:
            shown = await asyncio.to_thread(pages.answer, request, name, answer)
            first = shown.turn
        await asyncio.to_thread(pages.store.show, name, turn, answer)
        return await pages.respond(request, name, first)

    @router.post("/{name}/rename")
    def rename(
        request: Request, name: str, title: Annotated[str, Form(min_length=1, max_length=200)]
    ) -> Response:
        pages.read_own(request, name)
        pages.store.rename(name, " ".join(title.split()))
        return RedirectResponse(f"/chat/{name}", 303)

    @router.post("/{name}/delete")
    async def delete(request: Request, name: str) -> Response:
        await asyncio.to_thread(pages.read_own, request, name)
        await pages.replies.stop(name)
        await asyncio.to_thread(pages.store.delete, name)
        return RedirectResponse("/chat", 303)


# ---------------------------------------------------------------- templates


def _page(request: Request, pages: ChatPages, template: str, **values: Any) -> Response:
    """Render a template with the values and functions that all chat templates use, and with `values`.

    For a whole page, the list of recent conversations is among them.
    """
    conversation = values.get("talk")
    before = values.pop("before", float("inf"))
    recent = [] if is_fragment(request) else pages.store.recent(_user_name(request), before)
    shared = {
        "models": pages.state.model_names(),
        "listed": recent,
        "own": conversation is None or is_own(request, conversation),
        "pages": split_pages,
        "html": lambda page: Markup(render_page(page)),
        "unlike": partial(pages.unlike, partial(say, language_of(request))),
        "meter": partial(_figures, partial(say, language_of(request))),
        "thinks": False,
        "question": "",
    }
    return render(request, template, **{**shared, **values})


def _figures(phrases: Phrases, meter: Meter, thought: bool) -> str:
    """Return the tokens and the time in words, of the thought alone or of the whole answer.

    `phrases` returns the phrase of a key in the page's language.
    """
    tokens = meter.thought_tokens if thought else meter.tokens
    seconds = meter.thought_seconds if thought else meter.seconds
    count = phrases("chat.tokens", count=f"{tokens:,}")
    return f"{count} · {duration(phrases, seconds)}"


def _running_figures(language: str, meter: Meter, thinking: bool) -> dict[str, str]:
    """Return the texts that a page shows beside a running reply.

    `phase` tells whether it waits, thinks or answers; `thought` has the tokens and the time of its thought.
    """
    phrases = partial(say, language)
    if not meter.tokens:
        phase = f"{phrases('chat.waiting')} {duration(phrases, meter.seconds)}"
    elif thinking:
        phase = phrases("chat.thinking")
    else:
        phase = f"{phrases('chat.answering')} {_figures(phrases, meter, False)}"
    return {"phase": phase, "thought": _figures(phrases, meter, True)}


def duration(phrases: Phrases, seconds: float) -> str:
    """Return a time as words: in seconds if shorter than a minute, else in minutes and seconds."""
    if seconds < 60:
        return phrases("chat.seconds", count=f"{seconds:.1f}")
    return phrases("chat.minutes", minutes=int(seconds // 60), seconds=int(seconds % 60))


def _user_name(request: Request) -> str:
    """Return the name of the person of the request's session; empty without a session."""
    user = person(request)
    return user.name if user else ""
