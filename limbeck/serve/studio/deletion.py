"""The page that tells what the deletion of a run means, and deletes it once that is confirmed."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from ...pipeline import deletion, run_state
from ...types import LimbeckError
from .. import jobs
from ..app_state import AppState
from ..pages import render


def routes(state: AppState) -> APIRouter:
    """Return the router of the pages `/runs/-/delete/NAME`; the guard lets only pages of this server post."""
    router = APIRouter(include_in_schema=False)

    @router.get("/runs/-/delete/{name}")
    def show(request: Request, name: str) -> Response:
        folder = _folder(state, name)
        return _page(request, state, folder) if folder else _not_found(request)

    @router.post("/runs/-/delete/{name}")
    def confirm(request: Request, name: str) -> Response:
        folder = _folder(state, name)
        if folder is None:
            return _not_found(request)
        try:
            if jobs.state(folder).alive:
                raise LimbeckError(f"{folder} is being carried out; pause it first, then delete it")
            deletion.delete(folder)
        except LimbeckError as error:
            return _page(request, state, folder, str(error))
        return RedirectResponse("/runs", 303)

    return router


def _folder(state: AppState, name: str) -> Path | None:
    """Return the folder of the run with this name, which is only compared; None if there is none."""
    return next((folder for folder in run_state.list_runs(state.runs) if folder.name == name), None)


def _not_found(request: Request) -> Response:
    return render(request, "runs_lost.html.jinja", 404, sentence="")


def _page(request: Request, state: AppState, folder: Path, error: str = "") -> Response:
    """Render what the deletion of a run means; `error` is the message of an attempt that failed."""
    served = {name: model.folder for name, model in state.service.models.items()}
    foreseen = deletion.foresee(folder, served)
    alive = jobs.state(folder).alive
    values = {"name": folder.name, "foreseen": foreseen, "alive": alive, "wrong": error}
    return render(request, "runs_delete.html.jinja", 409 if error else 200, **values)
