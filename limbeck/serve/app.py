"""The one ASGI application: API and studio behind the same guard."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Form, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from .app_state import AppState
from .openai.routes import api
from .pages import ROOM, render
from .security import LOOPBACK, Guard, Limits
from .sessions import COOKIE, LASTS, Sessions

FOR_GOOD = {"cache-control": "public, max-age=31536000, immutable"}
ASK_AGAIN = {
    "cache-control": "no-cache"
}  # modules import one another by bare names: by two names, one module would run twice


def build(
    runs: Path,
    service: Any,
    key: str | None = None,
    hosts: frozenset[str] = frozenset(),
    limits: Limits = Limits(),  # noqa: B008
) -> Guard:
    """The guarded application over the runs in a folder and the models that `service` serves."""
    sessions = Sessions(runs / ".studio", key)
    site = AppState(runs, sessions, service)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(title="Limbeck", docs_url=None, redoc_url=None, lifespan=life)
    for room in rooms():
        app.include_router(room(site))
    app.include_router(_door(site, key))
    return Guard(app, LOOPBACK | hosts, key, sessions, limits)


def rooms() -> list[Callable[[AppState], APIRouter]]:
    """What makes the routes: each takes the site and returns an APIRouter."""
    from .studio import arena, chat, desk, runs

    return [api, arena.routes, chat.routes, desk.routes, runs.routes]


def _door(site: AppState, key: str | None) -> APIRouter:
    """The way in, and the files that pages are painted with."""
    door = APIRouter(include_in_schema=False)
    painted = {
        path.relative_to(ROOM / "static").as_posix(): path
        for path in (ROOM / "static").rglob("*")
        if path.is_file()
    }

    @door.get("/")
    def home() -> Response:
        return RedirectResponse("/chat", 303)

    @door.get("/hello")
    def hello(request: Request, next: str = "/") -> Response:
        return render(request, "hello.html.jinja", next=_inside(next), locked=key is not None, wrong=False)

    @door.post("/hello")
    def enter(
        request: Request,
        name: str = Form(max_length=60),
        given: str = Form("", max_length=400),
        next: str = Form("/"),
    ) -> Response:
        who = " ".join(name.split())
        if not who or (key is not None and not hmac.compare_digest(given.encode(), key.encode())):
            return render(
                request, "hello.html.jinja", 401, next=_inside(next), locked=key is not None, wrong=True
            )
        answer = RedirectResponse(_inside(next), 303)
        answer.set_cookie(COOKIE, site.sessions.open(who), max_age=LASTS, httponly=True, samesite="strict")
        return answer

    @door.get("/static/{name:path}")
    def static(name: str, v: str = "") -> Response:
        if name not in painted:
            return Response(status_code=404)
        return FileResponse(painted[name], headers=FOR_GOOD if v else ASK_AGAIN)

    @door.post("/theme")
    def theme(request: Request, to: str = Form(max_length=5), next: str = Form("/")) -> Response:
        answer = RedirectResponse(_inside(next), 303)
        answer.set_cookie("theme", to, max_age=LASTS, samesite="strict")
        return answer

    return door


def _inside(path: str) -> str:
    """A path of this server; anything that would lead elsewhere leads home."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"
