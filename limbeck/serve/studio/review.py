"""The cold-start desk: people read what a model thought, and say what is learned from it.

    /desk                          all queues
    /desk/RUN/STAGE                one queue: progress, rows, people
    /desk/RUN/STAGE/next           the next row that this person is asked about
    /desk/RUN/STAGE/disagreements  rows on which two disagree, to be settled
    /desk/RUN/STAGE/NUMBER         one row; ?edit=1 and ?reject=1 open its forms

Nobody is shown what another said of a row that they are still to be asked about. What counts lies in the queue's reviews;
here there are only drafts.
"""

from contextlib import suppress
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Body, Depends, Form, HTTPException, Request
from fastapi.responses import RedirectResponse, Response
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from ...pipeline.review import edits, review_queues, reviews
from ...pipeline.review.agreement import agreement, paces
from ...pipeline.review.review_queues import Desk
from ...pipeline.review.reviews import Standing
from ...types import LimbeckError
from .. import jobs
from ..app_state import AppState, signed_in
from ..pages import render
from ..review_drafts import Draft, Drafts
from ..sessions import Person

PAGE = 50  # rows of a queue on one page
REASONS = ("wrong", "unreadable", "mixed languages", "repeats itself", "gaps in the reasoning", "unsafe")
SHARES = (0.0, 0.1, 0.2, 0.5, 1.0)
SEPARATOR = "; "
LABELS = ("todo", "second", "disputed", "accept", "edit", "reject")
LONGEST = 3600.0  # seconds; a row that lay open for longer was not read for so long
TRANSLATE = (
    "Translate the reasoning below into {language}. Translate faithfully: add no step, leave none out, correct nothing, and keep "
    "formulas, numbers and code as they are. Answer with the translation alone.\n\n{thought}"
)
LANGUAGES = {"en": "English", "zh": "Chinese"}


# no `from __future__ import annotations` in this file: FastAPI could not resolve the names that `routes` gives to its rooms
Asker = Annotated[Person, Depends(signed_in)]


def routes(site: AppState) -> APIRouter:
    router = APIRouter(prefix="/desk", include_in_schema=False)
    drafts = Drafts(site.studio_folder)

    def opened(run: str, stage: str) -> Desk:
        """The desk of this address; it has rows."""
        try:
            desk = review_queues.desk(site.runs, run, stage)
        except LimbeckError as error:
            raise HTTPException(404, str(error)) from None
        if desk.queue is None:
            raise HTTPException(404, f"the rows of {stage} are not there yet")
        return desk

    At = Annotated[Desk, Depends(opened)]

    @router.get("")
    def every(request: Request) -> Response:
        found = review_queues.desks(site.runs)
        return render(
            request, "desk.html.jinja", desks=[(desk, tally(desk), jobs.state(desk.run)) for desk in found]
        )

    @router.get("/{run}/{stage}")
    def queue(
        request: Request,
        desk: At,
        person: Asker,
        q: str = "",
        show: str = "",
        lang_of: str = "",
        page: int = 1,
    ) -> Response:
        everything, begun = reviews.standings(desk.queue), drafts.begun(desk.queue.name, person.name)
        labels = {row.id: label(row, person.name) for row in everything}
        wanted = [row for row in everything if _fits(row, labels[row.id], q, show, lang_of, begun)]
        pages = max(1, -(-len(wanted) // PAGE))
        page = min(max(1, page), pages)
        return render(
            request,
            "desk_rows.html.jinja" if "hx-request" in request.headers else "desk_queue.html.jinja",
            desk=desk,
            q=q,
            show=show,
            lang_of=lang_of,
            page=page,
            pages=pages,
            rows=wanted[(page - 1) * PAGE : page * PAGE],
            found=len(wanted),
            labels=labels,
            begun=begun,
            counts={name: sum(1 for one in labels.values() if one == name) for name in LABELS},
            tally=tally(desk),
            mine=sum(row.due(person.name) for row in everything),
            job=jobs.state(desk.run),
            paces=paces(everything),
            agreement=agreement(everything).get("agreement"),
            share=reviews.second_share(desk.queue),
            shares=SHARES,
            languages=sorted({row.row.get("language", "") for row in everything} - {""}),
            here=address(desk),
            link=lambda **changes: (
                "?"
                + urlencode(
                    {k: v for k, v in {"q": q, "show": show, "lang_of": lang_of, **changes}.items() if v}
                )
            ),
        )

    @router.get("/{run}/{stage}/state")
    def state(request: Request, desk: At) -> Response:
        return render(
            request,
            "desk_state.html.jinja",
            desk=desk,
            tally=tally(desk),
            job=jobs.state(desk.run),
            here=address(desk),
        )

    @router.get("/{run}/{stage}/next")
    def next_row(desk: At, person: Asker, after: int = 0) -> Response:
        return RedirectResponse(_onward(desk, person, after, drafts.held(desk.queue.name, person.name)), 303)

    @router.get("/{run}/{stage}/disagreements")
    def disagreements(request: Request, desk: At, person: Asker) -> Response:
        disputed = [_opposed(row) for row in reviews.standings(desk.queue) if row.state == "disputed"]
        settled = [_opposed(row) for row in reviews.standings(desk.queue) if row.resolution]
        return render(
            request,
            "desk_disputes.html.jinja",
            desk=desk,
            here=address(desk),
            disputed=disputed,
            settled=settled,
        )

    @router.post("/{run}/{stage}/second")
    def second(desk: At, person: Asker, share: float = Form(ge=0, le=1)) -> Response:
        reviews.ask_twice(desk.queue, share, person.name)
        return RedirectResponse(address(desk), 303, background=_going_on(desk))

    @router.post("/{run}/{stage}/go")
    def go(desk: At) -> Response:
        with suppress(LimbeckError):  # it is at work already
            jobs.resume(desk.run)
        return RedirectResponse(address(desk), 303)

    def numbered(desk: At, number: int) -> Standing:
        rows = reviews.standings(desk.queue)
        if not 1 <= number <= len(rows):
            raise HTTPException(404, f"the queue has rows 1 to {len(rows)}")
        return rows[number - 1]

    Row = Annotated[Standing, Depends(numbered)]

    @router.get("/{run}/{stage}/{number}")
    def one(
        request: Request,
        desk: At,
        row: Row,
        person: Asker,
        edit: bool = False,
        reject: bool = False,
        read: bool = False,
        resolve: bool = False,
        after: int = 0,
    ) -> Response:
        due, mine = row.due(person.name), row.verdicts.get(person.name)
        resolve = resolve and row.state == "disputed"
        draft = drafts.find(desk.queue.name, row.id, person.name) if due or resolve else None
        if due:
            drafts.hold(desk.queue.name, row.id, person.name)
        asked, kept = due or resolve, draft or Draft("", "")
        written = (
            next((said["completion"] for said in row.verdicts.values() if said["verdict"] == "edit"), "")
            if resolve
            else ""
        )
        text, told = kept.text or written or row.row["completion"], kept.reason.split(SEPARATOR)
        said = (
            list(row.verdicts.items())
            if not due and row.state in ("settled", "disputed")
            else [(person.name, mine)]
            if mine
            else []
        )
        rows, blocks = (
            reviews.standings(desk.queue),
            [list(edits.marked(part, row.row["language"])) for part in edits.parts(row.row["completion"])],
        )
        return render(
            request,
            "desk_row.html.jinja",
            desk=desk,
            row=row,
            here=address(desk),
            asked=asked,
            resolve=resolve,
            due=due,
            mine=mine,
            rejecting=asked and not edit and (reject or bool(kept.reason and not kept.text and not read)),
            editing=asked and not reject and (edit or bool(kept.text and not read)),
            draft=kept,
            text=text,
            reasons=REASONS,
            why=set(told),
            reason=SEPARATOR.join(part for part in told if part not in REASONS),
            models=_models(site),
            finding=review_queues.verify(desk, row.row, row.row["completion"]),
            blocks=blocks,
            mixed=any(kind == "strange" for block in blocks for _, kind in block),
            said=[_told(row, *one) for one in said],
            change=_change(desk, row, text),
            resolution=row.resolution if not due else None,
            total=len(rows),
            done=sum(not r.due(person.name) for r in rows),
            left=sum(r.due(person.name) for r in rows),
            last=_last(rows, after, person.name),
            focus=request.cookies.get("desk_focus") == "1",
        )

    @router.post("/{run}/{stage}/{number}")
    def decide(
        desk: At,
        row: Row,
        person: Asker,
        id: str = Form(),
        verdict: str = Form(),
        completion: str | None = Form(None),
        why: list[str] = Form([]),  # noqa: B008
        reason: str = Form("", max_length=2000),
        seconds: float = Form(0.0),
        resolves: bool = Form(False),
    ) -> Response:
        if id != row.id or (resolves and row.state != "disputed"):
            raise HTTPException(409, "this row has changed since the page was opened; open it again")
        entry = _entry(row, person, verdict, completion, SEPARATOR.join(filter(None, [*why, reason.strip()])))
        timed = {"seconds": round(seconds, 1)} if 0 < seconds <= LONGEST else {}
        try:
            reviews.review(desk.queue, {**entry, **timed, **({"resolves": True} if resolves else {})})
        except LimbeckError as error:
            raise HTTPException(400, str(error)) from None
        drafts.drop(desk.queue.name, row.id, person.name)
        if resolves:
            return RedirectResponse(f"{address(desk)}/disagreements", 303, background=_going_on(desk))
        onward = _onward(desk, person, row.number, drafts.held(desk.queue.name, person.name))
        return RedirectResponse(f"{onward}?after={row.number}", 303, background=_going_on(desk))

    @router.post("/{run}/{stage}/{number}/undo")
    def undo(desk: At, row: Row, person: Asker) -> Response:
        reviews.undo(desk.queue, row.id, person.name)
        return RedirectResponse(f"{address(desk)}/{row.number}", 303)

    @router.post("/{run}/{stage}/{number}/draft")
    def draft(
        request: Request,
        desk: At,
        row: Row,
        person: Asker,
        id: str = Body(),
        text: str | None = Body(None),
        reason: str | None = Body(None),
    ) -> Response:
        """Keep what was typed, leaving alone what is not told; the answer is what has changed by it, as HTML."""
        if id != row.id:
            raise HTTPException(409, "this row has changed since the page was opened; open it again")
        kept, original = (
            drafts.find(desk.queue.name, row.id, person.name) or Draft("", ""),
            row.row["completion"],
        )
        kept = Draft(
            kept.text if text is None else "" if text == original else text,
            kept.reason if reason is None else reason,
        )
        drafts.keep(desk.queue.name, row.id, person.name, kept)
        return render(request, "desk_change.html.jinja", change=_change(desk, row, kept.text or original))

    @router.post("/{run}/{stage}/{number}/discard")
    def discard(desk: At, row: Row, person: Asker) -> Response:
        drafts.drop(desk.queue.name, row.id, person.name)
        return RedirectResponse(f"{address(desk)}/{row.number}", 303)

    @router.post("/{run}/{stage}/{number}/trim")
    def trim(desk: At, row: Row, text: str = Body(embed=True)) -> dict[str, str]:
        return {"text": edits.trimmed(text)}

    @router.post("/{run}/{stage}/{number}/translate")
    async def translate(desk: At, row: Row, text: str = Body(), model: str = Body("")) -> dict[str, str]:
        """The task's own translation where it has one; else a served model's."""
        done = await run_in_threadpool(review_queues.rewritten, desk, row.row, text)
        if done is None:
            done = await _by_model(site, model, text, row.row["language"])
        return {"text": done}

    @router.post("/focus")
    def focus(request: Request, next: str = Form("/desk", max_length=400)) -> Response:
        answer = RedirectResponse(next if next.startswith("/desk") else "/desk", 303)
        answer.set_cookie(
            "desk_focus", "0" if request.cookies.get("desk_focus") == "1" else "1", samesite="strict"
        )
        return answer

    return router


# ---------------------------------------------------------------- what pages are told


def address(desk: Desk) -> str:
    return f"/desk/{quote(desk.run.name, safe='')}/{quote(desk.stage, safe='')}"


def tally(desk: Desk) -> dict[str, int]:
    """Rows in all and in each state."""
    states = [row.state for row in reviews.standings(desk.queue)] if desk.queue else []
    return {
        "rows": len(states),
        **{name: states.count(name) for name in ("open", "second", "disputed", "settled")},
    }


def label(row: Standing, name: str) -> str:
    """What a person may know of a row: of one they are still asked about, that they are."""
    if row.due(name):
        return "todo"
    return row.verdict["verdict"] if row.state == "settled" else row.state


def _fits(row: Standing, label: str, q: str, show: str, language: str, begun: set[str]) -> bool:
    if show and (row.id not in begun if show == "draft" else label != show):
        return False
    if language and row.row.get("language") != language:
        return False
    return not q or q.casefold() in f"{row.row['prompt']}\n{row.row['completion']}\n{row.id}".casefold()


def _onward(desk: Desk, person: Person, after: int, held: set[str]) -> str:
    """Where this person goes on: the next row that nobody else looks at, then any, then the queue."""
    due = [row for row in reviews.standings(desk.queue) if row.due(person.name)]
    order = sorted(due, key=lambda row: (row.id in held, row.number <= after, row.number))
    return f"{address(desk)}/{order[0].number}" if order else address(desk)


def _last(rows: Any, after: int, name: str) -> Standing | None:
    """The row that this person has just decided, if its verdict can be taken back."""
    return rows[after - 1] if 1 <= after <= len(rows) and name in rows[after - 1].verdicts else None


def _entry(
    row: Standing, person: Person, verdict: str, completion: str | None, reason: str
) -> dict[str, Any]:
    """One verdict; an edit that changes nothing is called what it is."""
    entry: dict[str, Any] = {"id": row.id, "verdict": verdict, "reviewer": person.name}
    if verdict == "edit":
        text = (completion or "").replace("\r\n", "\n")  # as forms send line ends
        if text.strip() == row.row["completion"].strip():
            return {**entry, "verdict": "accept"}
        entry["completion"] = text
    return {**entry, **({"reason": reason} if reason else {})}


def _change(desk: Desk, row: Standing, text: str) -> dict[str, Any]:
    """How a text differs from the row's, and what the verifier says of it."""
    passages = edits.difference(row.row["completion"], text)
    return {
        "passages": passages,
        "changed": any(kind == "changed" for kind, *_ in passages),
        "finding": review_queues.verify(desk, row.row, text),
    }


def _told(row: Standing, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A verdict as it is shown: with what it changed."""
    passages = (
        edits.difference(row.row["completion"], entry["completion"]) if entry["verdict"] == "edit" else []
    )
    return {"name": name, **entry, "passages": passages}


def _opposed(row: Standing) -> dict[str, Any]:
    told = [_told(row, name, entry) for name, entry in row.verdicts.items()]
    return {
        "row": row,
        "said": told,
        "resolution": row.resolution and _told(row, row.resolution["reviewer"], row.resolution),
    }


def _models(site: AppState) -> list[str]:
    return sorted(getattr(site.service, "models", {}))


async def _by_model(site: AppState, model: str, text: str, language: str) -> str:
    names = _models(site)
    if not names:
        raise HTTPException(400, "this task cannot translate, and no model is served here that could")
    thought = review_queues.split_thought(text).thought
    asked = TRANSLATE.format(language=LANGUAGES.get(language, language), thought=thought or text)
    try:
        said = await site.service.answer(
            model if model in names else names[0], [{"role": "user", "content": asked}], temperature=0.3
        )
    except LimbeckError as error:
        raise HTTPException(400, str(error)) from None
    if not said.answer.strip():
        raise HTTPException(400, "the model gave no translation")
    return review_queues.with_thought(text, said.answer) if thought else said.answer.strip()


def _going_on(desk: Desk) -> BackgroundTask:
    return BackgroundTask(go_on, desk)


def go_on(desk: Desk) -> None:
    """Let a run that waits for people go on, if nothing is left to review. One that is at work sees it by itself."""
    if reviews.complete(desk.queue) and jobs.state(desk.run).name in ("waits", ""):
        with suppress(LimbeckError):
            jobs.resume(desk.run)
