"""The pages of runs: all runs, a run with the graph of its stages, and a stage with its curves.

A page that shows a run or a stage has a part that refreshes itself. A stage's page also shows responses and
samples.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self
from urllib.parse import quote

import yaml
from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from markupsafe import Markup

from ... import report as reports
from ...config.load import shipped
from ...pipeline import run_state, run_table, run_view
from ...pipeline.generations.ledger import ledger_pages
from ...report import i18n
from ...types import LimbeckError
from .. import jobs
from ..app_state import AppState
from ..pages import language_of, render

MAX_POINTS = 400  # points of a curve: as many as a wide screen can resolve
MAX_SETTINGS = 4  # differing settings of a run that the table shows before one unfolds the rest
MAX_SHOWN = 8  # flipped answers of each kind, and samples of an evaluation
REFRESH_ALIVE = "every 2s"
REFRESH_IDLE = "every 15s"  # a run may be started at a terminal, so an idle page refreshes too
REVALIDATE = {"cache-control": "private, no-cache"}


class Route(APIRoute):
    """A FastAPI route that turns a LimbeckError into a page with its message.

    Such an error is raised, for instance, for a run whose files cannot be read.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, changed so that it turns a LimbeckError into a page."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except LimbeckError as error:
                return _not_found(request, str(error), 409)

        return handler


@dataclass(frozen=True)
class StartForm:
    """The form that starts a run.

    `recipe` is a recipe from the list, or `path` a file in the folder of runs. `name` is the run's name, and
    `settings` has one override `key.path=value` on each line. With `auto`, the policy of each curate stage
    decides in place of people.
    """

    recipe: Annotated[str, Form(max_length=400)] = ""
    path: Annotated[str, Form(max_length=400)] = ""
    name: Annotated[str, Form(max_length=80)] = ""
    settings: Annotated[str, Form(max_length=20_000)] = ""
    auto: Annotated[bool, Form()] = False

    def overrides(self) -> list[str]:
        """Return the overrides of the recipe, each as `key.path=value`.

        The run's name is the last one, so that it takes precedence over a name among the settings.
        """
        overrides = [line.strip() for line in self.settings.splitlines() if line.strip()]
        if self.name.strip():
            overrides.append(f"name={self.name.strip()}")
        return overrides


@dataclass(frozen=True)
class Sorting:
    """The order of the table of runs: `Sorting("accuracy")` puts the best one first.

    `column` is one of `COLUMNS`; `ascending` is the direction. Runs without a value come last.
    """

    column: str = "date"
    ascending: bool = False

    @classmethod
    def of(cls, column: str, order: str) -> Self:
        """Return the sorting that an address asks for: the default one for an unknown column, and in a
        column's usual direction unless `order` is `up` or `down`."""
        if column not in COLUMNS:
            column = "date"
        return cls(column, order == "up" if order in ("up", "down") else column in ("name", "state"))

    def address(self, column: str) -> str:
        """Return the query that sorts by `column`; the other way round if the table is sorted by it."""
        if column != self.column:
            return f"?sort={column}"
        return f"?sort={column}&order={'down' if self.ascending else 'up'}"

    def sort(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows in this order."""
        value = COLUMNS[self.column]
        known = [row for row in rows if value(row) is not None]
        missing = [row for row in rows if value(row) is None]
        return sorted(known, key=value, reverse=not self.ascending) + missing


# column of the table of runs -> what it is sorted by
COLUMNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "name": lambda row: row["name"].lower(),
    "state": lambda row: row["state"].name,
    "date": lambda row: row["row"].changed,
    "time": lambda row: row["row"].seconds,
    "progress": lambda row: row["done"] / row["of"] if row["of"] else None,
    "accuracy": lambda row: row["row"].best and row["row"].best.mean,
}


@dataclass(frozen=True)
class LivePage:
    """A page with a part that refreshes itself.

    The template of the refreshed part is `NAME_live.html.jinja` and gets `values`. The template of the whole
    page is `NAME.html.jinja` and gets `page_values` too. `alive` is True if a process works on what is shown,
    in which case the part refreshes more often. `status` is the HTTP status.
    """

    name: str
    values: dict[str, Any]
    alive: bool
    page_values: dict[str, Any] = field(default_factory=dict)
    status: int = 200


class StageLine(NamedTuple):
    """A run, the line of one of its stages, and True if a process works on the run.

    The line of a stage is what the pages show of it: its kind, its state and its history.
    """

    run: run_state.RunState
    line: run_view.Line
    alive: bool


def routes(state: AppState) -> APIRouter:
    """Return the router of all pages under `/runs`, and of the data under `/curves`."""
    router = APIRouter(include_in_schema=False, route_class=Route)
    _add_list(router, state)
    _add_ledgers(router, state)
    _add_run(router, state)
    _add_stage(router, state)
    _add_curves(router, state)
    return router


# ---------------------------------------------------------------- all runs


def _add_list(router: APIRouter, state: AppState) -> None:
    @router.get("/runs")
    def every(request: Request, seen: str = "", sort: str = "date", order: str = "") -> Response:
        return _respond(request, _list_page(state, sorting=Sorting.of(sort, order)), seen)

    @router.post("/runs")
    def start(request: Request, form: Annotated[StartForm, Depends()]) -> Response:
        try:
            recipe = _recipe_path(state, form.recipe, form.path.strip())
            folder = jobs.start(recipe, state.runs, form.overrides(), form.auto)
        except LimbeckError as error:
            return _respond(request, _list_page(state, form, str(error)))
        return RedirectResponse(f"/runs/{quote(folder.name)}", 303)


def _list_page(
    state: AppState, form: StartForm | None = None, error: str = "", sorting: Sorting = Sorting()
) -> LivePage:
    """Return the page with the table of runs and the form that starts one.

    After a mistake in the form, `form` has the values to show again and `error` the message.
    """
    rows = sorting.sort(_list_rows(state))
    alive = any(row["state"].alive for row in rows)
    page_values = {"recipes": list(_recipes(state)), "told": asdict(form or StartForm()), "wrong": error}
    page_values["ledgers"] = list(ledger_pages(state.runs))
    values = {"rows": rows, "sorting": sorting, "shown": MAX_SETTINGS}
    return LivePage("runs", values, alive, page_values, status=400 if error else 200)


def _list_rows(state: AppState) -> list[dict[str, Any]]:
    """Return the template values of all runs, the most recently changed one first.

    A run whose recipe cannot be read is shown as failed, with the error.
    """
    readable = {}
    failures = {}
    folders = run_state.list_runs(state.runs)
    for folder in folders:
        try:
            readable[folder] = run_state.look(folder)
        except LimbeckError as error:
            failures[folder] = _failed_row(folder, str(error))
    table = run_table.rows(readable.values())
    rows = []
    for folder in folders:
        if folder in failures:
            rows.append(failures[folder])
        else:
            rows.append(_list_row(readable[folder], table[folder.name]))
    return rows


def _failed_row(folder: Path, error: str) -> dict[str, Any]:
    """Return the template values of a run whose recipe cannot be read; `error` is the reason."""
    row = run_table.RunRow(folder.name, run_state.last_change(folder), 0.0, None)
    failed = jobs.State("failed", error)
    return {"name": folder.name, "row": row, "state": failed, "lines": [], "done": 0, "of": 0, "report": ""}


def _list_row(run: run_state.RunState, row: run_table.RunRow) -> dict[str, Any]:
    """Return the template values of a run in the table, whose numbers are those of `row`."""
    state = _state(run)
    active = [stage for stage in run.stages if stage.state in ("begun", "asks")]
    reports_done = [stage.name for stage in run.stages if stage.kind == "report" and stage.state == "done"]
    return {
        "name": row.name,
        "row": row,
        "state": state,
        "lines": [run_view.line_of(run, stage, state.alive) for stage in active],
        "done": run.done,
        "of": len(run.stages),
        "report": _link(run, reports_done[0]) if reports_done else "",
    }


def _recipes(state: AppState) -> dict[str, Path]:
    """Return the recipes to choose from, by name.

    They are those shipped with Limbeck, and those in the folder of runs.
    """
    recipes = dict(shipped())
    for path in sorted(state.runs.glob("*.yaml")):
        recipes[path.relative_to(state.runs).as_posix()] = path
    return recipes


def _recipe_path(state: AppState, recipe: str, path: str) -> Path:
    """Return the file of the chosen recipe: `path` if it is given, else `recipe` from the list.

    Raises LimbeckError for a recipe that is not in the list, and for a path outside the folder of runs.
    """
    if path:
        return _path_inside_runs(state, path)
    recipes = _recipes(state)
    if recipe not in recipes:
        raise LimbeckError(
            "recipe: choose one of the list, or give the path of one inside the folder of runs"
        )
    return recipes[recipe]


def _path_inside_runs(state: AppState, path: str) -> Path:
    home = state.runs.resolve()
    file = home
    if "\0" not in path:
        file = (home / path).resolve()
    if not file.is_relative_to(home) or file.suffix not in (".yaml", ".yml"):
        raise LimbeckError(f"path: {path!r} is no YAML file inside {home}; put the recipe there first")
    return file


# ---------------------------------------------------------------- ledgers of generations


def _add_ledgers(router: APIRouter, state: AppState) -> None:
    @router.get("/runs/-/ledger/{name}")
    def ledger(request: Request, name: str) -> Response:
        page = ledger_pages(state.runs).get(name)
        return _report(page) if page else _not_found(request)


# ---------------------------------------------------------------- one run


def _add_run(router: APIRouter, state: AppState) -> None:
    @router.get("/runs/{name}")
    def show(request: Request, name: str, seen: str = "") -> Response:
        folder = _folder(state, name)
        if folder is None:
            return _not_found(request)
        return _respond(request, _run_page(folder), seen)

    @router.post("/runs/{name}/{action}")
    def act(request: Request, name: str, action: str) -> Response:
        folder = _folder(state, name)
        if folder is None or action not in ("pause", "resume"):
            return _not_found(request)
        try:
            if action == "pause":
                jobs.pause(folder)
            else:
                jobs.resume(folder)
        except LimbeckError as error:
            return _respond(request, _run_page(folder, str(error)))
        return RedirectResponse(f"/runs/{quote(name)}", 303)


def _run_page(folder: Path, error: str = "") -> LivePage:
    """Return the page of one run: its state, its stages, and an account of what has happened so far.

    `error` is the message of a failed attempt to pause or resume the run.
    """
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
    return LivePage("runs_run", values, state.alive, {"wrong": error}, status=409 if error else 200)


def _folder(state: AppState, name: str) -> Path | None:
    """Return the folder of the run with this name, None if there is none.

    The name is only compared with the names of folders and never made into a path, so it cannot lead
    elsewhere.
    """
    for folder in run_state.list_runs(state.runs):
        if folder.name == name:
            return folder
    return None


def _state(run: run_state.RunState) -> jobs.State:
    """Return the state of a run.

    A run without a recorded state, from an older version, is finished if all of its stages are.
    """
    state = jobs.state(run.folder)
    if not state.name and run.complete:
        return jobs.State("finished")
    return state


def _link(run: run_state.RunState, stage: str) -> str:
    """Return the address of the page of a run's stage."""
    return f"/runs/{quote(run.folder.name)}/{quote(stage)}"


# ---------------------------------------------------------------- one stage


@dataclass(frozen=True)
class StageQuery:
    """The query of a stage's page.

    `step` is the training step whose responses are shown, `against` the evaluation to compare with, and
    `beside` the stage (`RUN/STAGE`) whose curves are drawn too. `seen` is the digest of the refreshed part
    that the page shows; it is empty if a whole page is requested.
    """

    step: int | None = None
    against: str = ""
    beside: str = ""
    seen: str = ""


def _add_stage(router: APIRouter, state: AppState) -> None:
    @router.get("/runs/{name}/{stage:path}")
    def show(request: Request, name: str, stage: str, query: Annotated[StageQuery, Depends()]) -> Response:
        found = _stage_line(state, name, stage)
        if found is None:
            return _not_found(request)
        run, line, alive = found
        if line.kind == "report":
            folder = line.standing.folder
            return _report(folder / "index.html") if folder else _not_found(request)
        values = {"run": run, "line": line, "link": lambda other: _link(run, other)}
        page_values = {} if query.seen else _stage_values(state, run, line, query)
        return _respond(request, LivePage("runs_stage", values, alive, page_values), query.seen)


def _stage_values(
    state: AppState, run: run_state.RunState, line: run_view.Line, query: StageQuery
) -> dict[str, Any]:
    """Return the template values of a stage's page.

    They are its curves, responses, samples and settings, and its flipped answers: problems that were solved
    in one evaluation (or at one step) and not in another.
    """
    comparable = _comparable_stages(state, run, line)
    settings = line.standing.stage.model_dump(mode="json")
    return {
        "others": comparable,
        "beside": query.beside if query.beside in comparable else "",
        "panels": run_view.panels(line),
        "flipped": run_view.flipped(run, line, query.against),
        "rivals": run_view.rivals(run, line),
        "responses": run_view.responses(line, query.step),
        "samples": run_view.samples(line)[:MAX_SHOWN],
        "preview": run_view.previewed(run, line),
        "shown": MAX_SHOWN,
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    }


def _stage_line(state: AppState, name: str, stage: str) -> StageLine | None:
    """Return a stage, found by the name of its run and its own name; None if there is no such stage."""
    folder = _folder(state, name)
    if folder is None:
        return None
    run = run_state.look(folder)
    standing = run.stage(stage)
    if standing is None:
        return None
    alive = jobs.state(folder).alive
    return StageLine(run, run_view.line_of(run, standing, alive), alive)


def _comparable_stages(state: AppState, run: run_state.RunState, line: run_view.Line) -> list[str]:
    """Return `RUN/STAGE` for each stage, of any run, whose curves can be drawn beside this stage's.

    These are the other stages of the same kind; an evaluation has no curves.
    """
    if line.kind == "evaluate":
        return []
    names = []
    for folder in run_state.list_runs(state.runs):
        try:
            stages = run_state.look(folder).stages
        except LimbeckError:
            continue
        for stage in stages:
            if stage.kind == line.kind and stage.folder and stage.folder != line.standing.folder:
                names.append(f"{folder.name}/{stage.name}")
    return names


def _add_curves(router: APIRouter, state: AppState) -> None:
    @router.get("/curves/{name}/{stage:path}")
    def curves(request: Request, name: str, stage: str) -> Response:
        found = _stage_line(state, name, stage)
        if found is None:
            return JSONResponse({"detail": "there is no such stage"}, 404)
        line = found.line
        etag = f'W/"{line.state}-{line.history.version}"'
        headers = {"etag": etag, **REVALIDATE}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        content = {
            **line.history.curves(MAX_POINTS),
            "loads": line.history.loads,
            "alive": found.alive and line.state != "done",
        }
        return JSONResponse(content, headers=headers)


# ---------------------------------------------------------------- responses


def _respond(request: Request, page: LivePage, seen: str = "") -> Response:
    """Return the response with a page, or with its refreshed part alone.

    `seen` is the digest of the part that the browser shows; empty asks for the whole page. If the part has
    not changed, the status is 204, which makes htmx leave everything as it is.
    """
    language = language_of(request)
    values = {
        **page.values,
        "say": lambda text: getattr(text, language),
        "words": i18n,
        "date": _date,
        "draw": run_view.draw,
        "alive": page.alive,
    }
    live = render(request, f"{page.name}_live.html.jinja", **values).body
    digest = hashlib.sha256(live).hexdigest()[:16]
    if seen == digest:
        return Response(status_code=204)
    address = Markup.escape(_own_address(request, digest))
    trigger = REFRESH_ALIVE if page.alive else REFRESH_IDLE
    part = Markup(
        f'<div id="live" hx-get="{address}" hx-trigger="{trigger}" hx-swap="outerHTML">{live.decode()}</div>'
    )
    if seen:
        return HTMLResponse(part)
    return render(request, f"{page.name}.html.jinja", page.status, live=part, **values, **page.page_values)


def _date(seconds: float) -> str:
    """Return a Unix time as the date and the time of day at the server: `2026-11-27 14:05`."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _own_address(request: Request, digest: str) -> str:
    """Return the address of a page's refreshed part: the page's own, with the digest of what it shows."""
    url = request.url.include_query_params(seen=digest)
    return f"{url.path}?{url.query}"


def _not_found(request: Request, sentence: str = "", status: int = 404) -> Response:
    """Render the page for a run or a stage that cannot be shown; `sentence` tells the reason."""
    return render(request, "runs_lost.html.jinja", status, sentence=sentence)


@cache
def _script_digest() -> str:
    """Return the digest of the script in a report.

    The content security policy allows only this script to run.
    """
    template = Path(reports.__file__).parent / "language.html.jinja"
    source = template.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL).group(1)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _report(page: Path) -> Response:
    """Return the response with a report's HTML file.

    The file contains its own styles and script, and loads nothing, so its content security policy forbids the
    rest.
    """
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{_script_digest()}'; frame-ancestors 'none'; base-uri 'none'"
    )
    return HTMLResponse(page.read_bytes(), headers={"content-security-policy": policy})
