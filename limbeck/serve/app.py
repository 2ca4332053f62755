"""The ASGI application: the API and the studio's pages, behind one guard.

The API is compatible with OpenAI's; the studio's pages are chat, arena, review and runs.
"""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, Form, Query, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from .app_state import AppState
from .openai.routes import add_error_handlers, api
from .pages import FOLDER, render
from .security import LOOPBACK, Guard, Limits
from .service import Service
from .sessions import COOKIE, MAX_AGE_SECONDS, Sessions

IMMUTABLE = {"cache-control": "public, max-age=31536000, immutable"}
# The page that a form leads back to.
NextQuery = Annotated[str, Query(alias="next")]
NextField = Annotated[str, Form(alias="next")]
# Modules import one another by addresses without a hash, so these are revalidated: under two addresses, one
# module would run twice.
REVALIDATE = {"cache-control": "no-cache"}


def build(
    runs: Path,
    service: Service,
    key: str | None = None,
    hosts: frozenset[str] = frozenset(),
    limits: Limits = Limits(),  # noqa: B008
) -> Guard:
    """Build the application for a folder of runs and the models of `service`, wrapped in the guard.

    `key` is required of every client; None requires none. `hosts` are further host names under which the
    server may be addressed. `limits` bound the size and the time of a request's body.
    """
    sessions = Sessions(runs / ".studio", key)
    state = AppState(runs, sessions, service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(title="Limbeck", docs_url=None, redoc_url=None, lifespan=lifespan)
    add_error_handlers(app)
    for make_router in routers():
        app.include_router(make_router(state))
    app.include_router(_entrance(state, key))
    return Guard(app, LOOPBACK | hosts, key, sessions, limits)


def routers() -> list[Callable[[AppState], APIRouter]]:
    """Return the functions that each make a router of the API or of a studio page.

    Each takes the state that all routes share.
    """
    from .studio import arena, chat, comparison, deletion, review, runs

    of_runs = [comparison.routes, deletion.routes, runs.routes]  # the pages of one run match nearly anything
    return [api, arena.routes, chat.routes, review.routes, *of_runs]


def _entrance(state: AppState, key: str | None) -> APIRouter:
    """Return the router of the sign-in page, the choice of the theme, and the static files."""
    router = APIRouter(include_in_schema=False)
    static_files = _static_files()

    @router.get("/")
    def home() -> Response:
        return RedirectResponse("/chat", 303)

    @router.get("/hello")
    def hello(request: Request, target: NextQuery = "/") -> Response:
        return _sign_in_page(request, target, locked=key is not None)

    @router.post("/hello")
    def sign_in(
        request: Request,
        name: str = Form(max_length=60),
        given_key: Annotated[str, Form(alias="given", max_length=400)] = "",
        target: NextField = "/",
    ) -> Response:
        name = " ".join(name.split())
        key_fits = key is None or hmac.compare_digest(given_key.encode(), key.encode())
        if not name or not key_fits:
            return _sign_in_page(request, target, locked=key is not None, wrong=True)
        response = RedirectResponse(_own_path(target), 303)
        cookie = state.sessions.open(name)
        response.set_cookie(COOKIE, cookie, max_age=MAX_AGE_SECONDS, httponly=True, samesite="strict")
        return response

    @router.get("/static/{name:path}")
    def static(name: str, v: str = "") -> Response:
        if name not in static_files:
            return Response(status_code=404)
        return FileResponse(static_files[name], headers=IMMUTABLE if v else REVALIDATE)

    @router.post("/theme")
    def theme(request: Request, to: str = Form(max_length=5), target: NextField = "/") -> Response:
        response = RedirectResponse(_own_path(target), 303)
        response.set_cookie("theme", to, max_age=MAX_AGE_SECONDS, samesite="strict")
        return response

    return router


def _sign_in_page(request: Request, target: str, locked: bool, wrong: bool = False) -> Response:
    """Render the page that asks for a name, and for the server's key if `locked`.

    `target` is the path to go to after signing in. `wrong` tells that the name or the key just sent was
    refused.
    """
    status = 401 if wrong else 200
    return render(request, "hello.html.jinja", status, next=_own_path(target), locked=locked, wrong=wrong)


def _static_files() -> dict[str, Path]:
    """Return the files of the folder `static/`, by their path relative to that folder."""
    folder = FOLDER / "static"
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def _own_path(path: str) -> str:
    """Return `path` if it is a path on this server; any other address is replaced by `/`.

    This keeps a link from redirecting people to another site after they have signed in.
    """
    if not path.startswith("/") or path.startswith(("//", "/\\")):
        return "/"
    return path
