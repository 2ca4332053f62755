"""Runs: all of them, one with its stages as a graph, one stage with its curves and its responses."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from markupsafe import Markup

from ... import report as reports
from ...config.load import shipped
from ...pipeline import run_state, run_view
from ...report import i18n
from ...types import LimbeckError
from .. import jobs
from ..app_state import AppState
from ..pages import language_of, render

POINTS = 400  # of a curve: as many as a wide screen can tell apart
SHOWN = 8  # flips of each sort, and samples of an evaluation
LIVE, STILL = "every 2s", "every 15s"  # somebody may start a run at a terminal, so a page at rest looks too
BLANK = {"recipe": "", "path": "", "name": "", "settings": "", "auto": False}
AGAIN = {"cache-control": "private, no-cache"}


class Told(APIRoute):
    """A run whose files cannot be read is a sentence on the page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def told(request: Request) -> Response:
            try:
                return await handle(request)
            except LimbeckError as error:
                return _lost(request, str(error), 409)

        return told


def routes(site: AppState) -> APIRouter:
    door = APIRouter(include_in_schema=False, route_class=Told)

    def everything(
        request: Request, seen: str = "", wrong: str = "", told: dict[str, Any] | None = None
    ) -> Response:
        rows = [_row(folder) for folder in run_state.runs_in(site.runs)]
        live = any(row["state"].alive for row in rows)
        more = {"recipes": list(_recipes(site)), "told": told or BLANK, "wrong": wrong}
        return _page(request, "runs", {"rows": rows}, more, live, seen, 400 if wrong else 200)

    def single(request: Request, folder: Path, seen: str = "", wrong: str = "") -> Response:
        run = run_state.look(folder)
        state = _state(run)
        lines = run_view.lines(run, state.alive)
        values = {
            "run": run,
            "state": state,
            "lines": lines,
            "said": run_view.narrate(run, lines),
            "link": lambda stage: _link(run, stage),
        }
        return _page(request, "runs_run", values, {"wrong": wrong}, state.alive, seen, 409 if wrong else 200)

    @door.get("/runs")
    def every(request: Request, seen: str = "") -> Response:
        return everything(request, seen)

    @door.post("/runs")
    def start(
        request: Request,
        recipe: str = Form("", max_length=400),
        path: str = Form("", max_length=400),
        name: str = Form("", max_length=80),
        settings: str = Form("", max_length=20_000),
        auto: bool = Form(False),
    ) -> Response:
        named = [f"name={name.strip()}"] if name.strip() else []
        overrides = [*(line.strip() for line in settings.splitlines() if line.strip()), *named]
        try:
            folder = jobs.start(_chosen(site, recipe, path.strip()), site.runs, overrides, auto)
        except LimbeckError as error:
            told = {"recipe": recipe, "path": path, "name": name, "settings": settings, "auto": auto}
            return everything(request, "", str(error), told)
        return RedirectResponse(f"/runs/{quote(folder.name)}", 303)

    @door.get("/runs/{name}")
    def one(request: Request, name: str, seen: str = "") -> Response:
        folder = _folder(site, name)
        return single(request, folder, seen) if folder else _lost(request)

    @door.post("/runs/{name}/{what}")
    def act(request: Request, name: str, what: str) -> Response:
        folder = _folder(site, name)
        if folder is None or what not in ("pause", "resume"):
            return _lost(request)
        try:
            (jobs.pause if what == "pause" else jobs.resume)(folder)
        except LimbeckError as error:
            return single(request, folder, "", str(error))
        return RedirectResponse(f"/runs/{quote(name)}", 303)

    @door.get("/runs/{name}/{stage:path}")
    def stage(
        request: Request,
        name: str,
        stage: str,
        step: int | None = None,
        against: str = "",
        beside: str = "",
        seen: str = "",
    ) -> Response:
        found = _line(site, name, stage)
        if found is None:
            return _lost(request)
        run, line, alive = found
        if line.kind == "report":
            return _report(line.standing.folder / "index.html") if line.standing.folder else _lost(request)
        values = {"run": run, "line": line, "link": lambda other: _link(run, other)}
        if seen:
            return _page(request, "runs_stage", values, {}, alive, seen)
        others = _others(site, run, line)
        more = {
            "others": others,
            "beside": beside if beside in others else "",
            "panels": run_view.panels(line),
            "flipped": run_view.flipped(run, line, against),
            "rivals": run_view.rivals(run, line),
            "responses": run_view.responses(line, step),
            "samples": run_view.samples(line)[:SHOWN],
            "shown": SHOWN,
            "settings": yaml.safe_dump(
                line.standing.stage.model_dump(mode="json"), sort_keys=False, allow_unicode=True
            ),
        }
        return _page(request, "runs_stage", values, more, alive)

    @door.get("/curves/{name}/{stage:path}")
    def curves(request: Request, name: str, stage: str) -> Response:
        found = _line(site, name, stage)
        if found is None:
            return JSONResponse({"detail": "there is no such stage"}, 404)
        _, line, alive = found
        tag = f'W/"{line.state}-{line.history.version}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"etag": tag, **AGAIN})
        told = {
            **line.history.curves(POINTS),
            "loads": line.history.loads,
            "alive": alive and line.state != "done",
        }
        return JSONResponse(told, headers={"etag": tag, **AGAIN})

    return door


# ---------------------------------------------------------------- what is looked at


def _folder(site: AppState, name: str) -> Path | None:
    """The run of a name: one of those that there are, whatever the name may look like."""
    return next((folder for folder in run_state.runs_in(site.runs) if folder.name == name), None)


def _line(site: AppState, name: str, stage: str) -> tuple[run_state.Overview, run_view.Line, bool] | None:
    folder = _folder(site, name)
    run = run_state.look(folder) if folder else None
    standing = run.stage(stage) if run else None
    if standing is None:
        return None
    alive = jobs.state(folder).alive
    return run, run_view.line_of(run, standing, alive), alive


def _state(run: run_state.Overview) -> jobs.State:
    """Where a run stands; one of the time before runs said how they end is finished when all of its stages are."""
    state = jobs.state(run.folder)
    return jobs.State("finished") if not state.name and run.complete else state


def _link(run: run_state.Overview, stage: str) -> str:
    return f"/runs/{quote(run.folder.name)}/{quote(stage)}"


def _row(folder: Path) -> dict[str, Any]:
    """One run in the list of all; a recipe that can no longer be read is told as it is."""
    try:
        run = run_state.look(folder)
    except LimbeckError as error:
        return {
            "name": folder.name,
            "state": jobs.State("failed", str(error)),
            "lines": [],
            "done": 0,
            "of": 0,
            "report": "",
        }
    state = _state(run)
    busy = [
        run_view.line_of(run, standing, state.alive)
        for standing in run.stages
        if standing.state in ("begun", "asks")
    ]
    report = next((one.name for one in run.stages if one.kind == "report" and one.state == "done"), "")
    return {
        "name": folder.name,
        "state": state,
        "lines": busy,
        "done": run.done,
        "of": len(run.stages),
        "report": report and _link(run, report),
    }


def _others(site: AppState, run: run_state.Overview, line: run_view.Line) -> list[str]:
    """`RUN/STAGE` of everything whose curves can stand beside these: the same kind, here and in other runs."""
    found = []
    for folder in run_state.runs_in(site.runs):
        try:
            other = run_state.look(folder)
        except LimbeckError:
            continue
        same = (
            one
            for one in other.stages
            if one.kind == line.kind and one.folder and one.folder != line.standing.folder
        )
        found += [f"{folder.name}/{one.name}" for one in same]
    return found if line.kind != "evaluate" else []


# ---------------------------------------------------------------- recipes


def _recipes(site: AppState) -> dict[str, Path]:
    """What can be started by a click: recipes that came with Limbeck, and those of the folder of runs."""
    own = {path.relative_to(site.runs).as_posix(): path for path in sorted(site.runs.glob("*.yaml"))}
    return {f"recipes/{path.name}": path for path in shipped()} | own


def _chosen(site: AppState, recipe: str, path: str) -> Path:
    if not path:
        if recipe not in _recipes(site):
            raise LimbeckError(
                "recipe: choose one of the list, or give the path of one inside the folder of runs"
            )
        return _recipes(site)[recipe]
    home = site.runs.resolve()
    place = (home / path).resolve() if "\0" not in path else home
    if not place.is_relative_to(home) or place.suffix not in (".yaml", ".yml"):
        raise LimbeckError(f"path: {path!r} is no YAML file inside {home}; put the recipe there first")
    return place


# ---------------------------------------------------------------- pages


def _page(
    request: Request,
    name: str,
    values: dict[str, Any],
    more: dict[str, Any],
    alive: bool,
    seen: str = "",
    status: int = 200,
) -> Response:
    """A page with a part that renews itself. What is asked with the mark of what was seen gets that part alone, and
    204, which leaves everything as it is, where nothing has changed."""
    language = language_of(request)
    values = {
        **values,
        "say": lambda text: getattr(text, language),
        "words": i18n,
        "draw": run_view.draw,
        "alive": alive,
    }
    live = render(request, f"{name}_live.html.jinja", **values).body
    mark = hashlib.sha256(live).hexdigest()[:16]
    if seen == mark:
        return Response(status_code=204)
    address = (
        f'hx-get="{Markup.escape(request.url.path)}?seen={mark}" hx-trigger="{LIVE if alive else STILL}"'
    )
    part = Markup(f'<div id="live" {address} hx-swap="outerHTML">{live.decode()}</div>')
    if seen:
        return HTMLResponse(part)
    return render(request, f"{name}.html.jinja", status, live=part, **values, **more)


def _lost(request: Request, sentence: str = "", status: int = 404) -> Response:
    return render(request, "runs_lost.html.jinja", status, sentence=sentence)


@cache
def _spoken() -> str:
    """What lets the report's own script, and no other, run: its digest."""
    source = (Path(reports.__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL).group(1)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _report(page: Path) -> Response:
    """The report as it was written; it brings its own styles, and needs nothing from anywhere."""
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_spoken()}'; frame-ancestors 'none'; base-uri 'none'"
    return HTMLResponse(page.read_bytes(), headers={"content-security-policy": policy})
