"""The review page: people read the reasoning of a row, and accept, edit or reject it.

A row is an example for the cold-start training: a prompt and a completion with its reasoning. A queue holds
the rows of one stage of a run that people review; a person's decision on a row is a verdict. A row is due for
a person if they are to review it, disputed if two people's verdicts differ, and settled once it has a final
verdict. A row that a person has open is held for them: other people are offered other rows first.

    /desk                          all queues
    /desk/RUN/STAGE                one queue: progress, rows, people
    /desk/RUN/STAGE/next           the next row that this person is to review
    /desk/RUN/STAGE/disagreements  rows with two different verdicts, to be resolved by a final one
    /desk/RUN/STAGE/NUMBER         one row; ?edit=1 and ?reject=1 open its forms

A person does not see the verdicts of others on a row that is due for them. Reviews are stored in the
queue; the studio's own database holds only drafts.
"""

# No `from __future__ import annotations`: FastAPI cannot resolve names that are defined inside a function.
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Body, Depends, Form, HTTPException, Request
from fastapi.responses import RedirectResponse, Response
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from ...pipeline.review import edits, queue_list, review_queue
from ...pipeline.review.agreement import agreement, paces
from ...pipeline.review.queue_list import ReviewQueue
from ...pipeline.review.review_queue import ReviewState
from ...types import LimbeckError
from .. import jobs
from ..app_state import AppState, signed_in
from ..pages import is_fragment, render
from ..review_drafts import Draft, DraftKey, Drafts
from ..sessions import Person

ROWS_PER_PAGE = 50  # rows of a queue
REASONS = ("wrong", "unreadable", "mixed languages", "repeats itself", "gaps in the reasoning", "unsafe")
SHARES = (0.0, 0.1, 0.2, 0.5, 1.0)
SEPARATOR = "; "
LABELS = ("todo", "second", "disputed", "accept", "edit", "reject")
MAX_READING_SECONDS = 3600.0  # seconds; a row that was open for longer was not read all the time
TRANSLATION_TEMPERATURE = 0.3  # close to greedy: a translation has little freedom
TRANSLATE = (
    "Translate the reasoning below into {language}. Translate faithfully: add no step, leave none out, "
    "correct nothing, and keep formulas, numbers and code as they are. Answer with the translation alone.\n\n"
    "{thought}"
)
LANGUAGES = {"en": "English", "zh": "Chinese"}

SignedIn = Annotated[Person, Depends(signed_in)]


@dataclass(frozen=True)
class QueueQuery:
    """The query of a queue's table: filters of its rows, and the number of the page.

    `q` is a search text, `show` a label (see `label`) or "draft", `lang_of` a language; an empty value
    selects all rows.
    """

    q: str = ""
    show: str = ""
    lang_of: str = ""
    page: int = 1

    def link(self, **changes: Any) -> str:
        """Return the query string with some of the values changed.

        It leads to the first page unless `page` is among the changes.
        """
        values = {"q": self.q, "show": self.show, "lang_of": self.lang_of, **changes}
        return "?" + urlencode({name: value for name, value in values.items() if value})

    def matches(self, row: ReviewState, label: str, begun: set[str]) -> bool:
        """True if a row fits all filters.

        `label` is the row's label for the person; `begun` has the ids of the rows of which they have a draft.
        """
        if self.show == "draft" and row.id not in begun:
            return False
        if self.show not in ("", "draft", label):
            return False
        if self.lang_of and row.row.get("language") != self.lang_of:
            return False
        if not self.q:
            return True
        text = f"{row.row['prompt']}\n{row.row['completion']}\n{row.id}"
        return self.q.casefold() in text.casefold()


@dataclass(frozen=True)
class RowQuery:
    """The query of a row's page.

    `edit` and `reject` open their forms, `read` keeps both closed even if there is a draft, and `resolve`
    asks for a final verdict on a disagreement. `after` is the number of the row that the person reviewed
    before.
    """

    edit: bool = False
    reject: bool = False
    read: bool = False
    resolve: bool = False
    after: int = 0


@dataclass(frozen=True)
class Decision:
    """The form with a person's verdict on a row.

    `verdict` is "accept", "edit" or "reject". `completion` is the edited text; `why` are ready-made reasons
    and `reason` is a typed one. `seconds` is the time for which the row was open. `resolves` marks a final
    verdict on a disagreement.
    """

    id: Annotated[str, Form()]
    verdict: Annotated[str, Form()]
    completion: Annotated[str | None, Form()] = None
    why: Annotated[tuple[str, ...], Form()] = ()
    reason: Annotated[str, Form(max_length=2000)] = ""
    seconds: Annotated[float, Form()] = 0.0
    resolves: Annotated[bool, Form()] = False

    def entry(self, row: ReviewState, person: Person) -> dict[str, Any]:
        """Return the review as the queue stores it.

        An edit that changes nothing is stored as an acceptance.
        """
        entry: dict[str, Any] = {"id": row.id, "verdict": self.verdict, "reviewer": person.name}
        text = (self.completion or "").replace("\r\n", "\n")  # forms send CRLF
        reason = SEPARATOR.join(filter(None, [*self.why, self.reason.strip()]))
        if self.verdict == "edit" and text.strip() == row.row["completion"].strip():
            entry["verdict"] = "accept"
            reason = ""
        elif self.verdict == "edit":
            entry["completion"] = text
        if reason:
            entry["reason"] = reason
        if 0 < self.seconds <= MAX_READING_SECONDS:
            entry["seconds"] = round(self.seconds, 1)
        if self.resolves:
            entry["resolves"] = True
        return entry


@dataclass(frozen=True)
class QueueRow:
    """A row together with its queue."""

    desk: ReviewQueue
    row: ReviewState

    @property
    def address(self) -> str:
        """The address of the row's page."""
        return f"{address(self.desk)}/{self.row.number}"

    @property
    def completion(self) -> str:
        """The text of the row before any edit."""
        return self.row.row["completion"]

    @property
    def language(self) -> str:
        """The language of the row, such as "en"."""
        return self.row.row["language"]

    def key(self, person: Person) -> DraftKey:
        """Return the key of a person's draft of this row."""
        return DraftKey(self.desk.queue.name, self.row.id, person.name)

    def check_unchanged(self, row_id: str) -> None:
        """Raise an HTTPException with status 409 if the row is not the one that the page has shown.

        `row_id` is the id of the row on the page. A number may stand for another row after the queue was made
        anew.
        """
        if row_id != self.row.id:
            raise HTTPException(409, "this row has changed since the page was opened; open it again")

    def change(self, text: str) -> dict[str, Any]:
        """Return the template values of an edit.

        They are the passages in which `text` differs from the row's text, whether any does, and the finding
        of the task's verifier on `text`.
        """
        passages = edits.difference(self.completion, text)
        return {
            "passages": passages,
            "changed": any(kind == "changed" for kind, *_ in passages),
            "finding": queue_list.verify(self.desk, self.row.row, text),
        }


class ReviewPages:
    """What the routes of the review page share: the state of the server and the drafts."""

    def __init__(self, state: AppState):
        self.state = state
        self.drafts = Drafts(state.studio_folder)

    def queue(self, run: str, stage: str) -> ReviewQueue:
        """Return the queue of a stage of a run.

        Raises an HTTPException with status 404 if there is no such queue, or if it has no rows yet.
        """
        try:
            desk = queue_list.find_queue(self.state.runs, run, stage)
        except LimbeckError as error:
            raise HTTPException(404, str(error)) from None
        if desk.queue is None:
            raise HTTPException(404, f"the rows of {stage} are not there yet")
        return desk

    def row(self, run: str, stage: str, number: int) -> QueueRow:
        """Return the row with a number, counted from 1.

        Raises an HTTPException with status 404 if the queue has no such row.
        """
        desk = self.queue(run, stage)
        rows = review_queue.review_states(desk.queue)
        if not 1 <= number <= len(rows):
            raise HTTPException(404, f"the queue has rows 1 to {len(rows)}")
        return QueueRow(desk, rows[number - 1])

    def next_address(self, desk: ReviewQueue, person: Person, after: int) -> str:
        """Return the address of the row that a person is to review next.

        Rows that nobody else holds come first, and among them the rows after the number `after`. If no row is
        left for the person, it is the address of the queue.
        """
        held = self.drafts.held_by_others(desk.queue.name, person.name)
        due = [row for row in review_queue.review_states(desk.queue) if row.due(person.name)]
        if not due:
            return address(desk)
        row = min(due, key=lambda row: (row.id in held, row.number <= after, row.number))
        return f"{address(desk)}/{row.number}"

    def model_names(self) -> list[str]:
        """Return the names of the served models, any of which can translate."""
        return sorted(self.state.model_names())


def routes(state: AppState) -> APIRouter:
    """Return the router of all pages under `/desk`."""
    router = APIRouter(prefix="/desk", include_in_schema=False)
    pages = ReviewPages(state)
    _add_queues(router, pages)
    _add_queue_actions(router, pages)
    _add_rows(router, pages)
    _add_drafts(router, pages)
    _add_text_tools(router, pages)
    return router


# ---------------------------------------------------------------- queues


def _add_queues(router: APIRouter, pages: ReviewPages) -> None:
    Queue = Annotated[ReviewQueue, Depends(pages.queue)]

    @router.get("")
    def every(request: Request) -> Response:
        desks = queue_list.list_queues(pages.state.runs)
        rows = [(desk, tally(desk), jobs.state(desk.run)) for desk in desks]
        return render(request, "desk.html.jinja", desks=rows)

    @router.get("/{run}/{stage}")
    def queue(
        request: Request, desk: Queue, person: SignedIn, query: Annotated[QueueQuery, Depends()]
    ) -> Response:
        rows = review_queue.review_states(desk.queue)
        begun = pages.drafts.begun(desk.queue.name, person.name)
        template = "desk_rows.html.jinja" if is_fragment(request) else "desk_queue.html.jinja"
        return render(
            request,
            template,
            desk=desk,
            here=address(desk),
            begun=begun,
            **_table(rows, query, person, begun),
            **_queue_head(desk, rows, person),
        )

    @router.get("/{run}/{stage}/state")
    def state(request: Request, desk: Queue) -> Response:
        return render(
            request,
            "desk_state.html.jinja",
            desk=desk,
            tally=tally(desk),
            job=jobs.state(desk.run),
            here=address(desk),
        )

    @router.get("/{run}/{stage}/next")
    def next_row(desk: Queue, person: SignedIn, after: int = 0) -> Response:
        return RedirectResponse(pages.next_address(desk, person, after), 303)

    @router.get("/{run}/{stage}/disagreements")
    def disagreements(request: Request, desk: Queue, person: SignedIn) -> Response:
        rows = review_queue.review_states(desk.queue)
        return render(
            request,
            "desk_disputes.html.jinja",
            desk=desk,
            here=address(desk),
            disputed=[_disagreement(row) for row in rows if row.state == "disputed"],
            settled=[_disagreement(row) for row in rows if row.resolution],
        )


def _add_queue_actions(router: APIRouter, pages: ReviewPages) -> None:
    Queue = Annotated[ReviewQueue, Depends(pages.queue)]

    @router.post("/{run}/{stage}/second")
    def second(desk: Queue, person: SignedIn, share: float = Form(ge=0, le=1)) -> Response:
        review_queue.set_second_share(desk.queue, share, person.name)
        return RedirectResponse(address(desk), 303, background=_resume_later(desk))

    @router.post("/{run}/{stage}/go")
    def go(desk: Queue) -> Response:
        with suppress(LimbeckError):  # the run is at work already
            jobs.resume(desk.run)
        return RedirectResponse(address(desk), 303)

    @router.post("/focus")
    def focus(
        request: Request, target: Annotated[str, Form(alias="next", max_length=400)] = "/desk"
    ) -> Response:
        response = RedirectResponse(target if target.startswith("/desk") else "/desk", 303)
        response.set_cookie("desk_focus", "0" if _focused(request) else "1", samesite="strict")
        return response


def _table(rows: Sequence[ReviewState], query: QueueQuery, person: Person, begun: set[str]) -> dict[str, Any]:
    """Return the template values of a queue's table.

    They are the filters of the query, and the rows of one page that fit them. `begun` has the ids of the rows
    of which the person has a draft.
    """
    labels = {row.id: label(row, person.name) for row in rows}
    matching = [row for row in rows if query.matches(row, labels[row.id], begun)]
    pages = max(1, -(-len(matching) // ROWS_PER_PAGE))
    page = min(max(1, query.page), pages)
    values = list(labels.values())
    return {
        **asdict(query),
        "page": page,
        "pages": pages,
        "rows": matching[(page - 1) * ROWS_PER_PAGE : page * ROWS_PER_PAGE],
        "found": len(matching),
        "labels": labels,
        "counts": {name: values.count(name) for name in LABELS},
        "languages": sorted({row.row.get("language", "") for row in rows} - {""}),
        "link": query.link,
    }


def _queue_head(desk: ReviewQueue, rows: Sequence[ReviewState], person: Person) -> dict[str, Any]:
    """Return the template values of the upper part of a queue's page.

    They are the progress, the state of the run, and the pace and the agreement of the reviewers.
    """
    return {
        "tally": tally(desk),
        "mine": sum(row.due(person.name) for row in rows),
        "job": jobs.state(desk.run),
        "paces": paces(rows),
        "agreement": agreement(rows).get("agreement"),
        "share": review_queue.second_share(desk.queue),
        "shares": SHARES,
    }


def address(desk: ReviewQueue) -> str:
    """Return the address of a queue's page."""
    return f"/desk/{quote(desk.run.name, safe='')}/{quote(desk.stage, safe='')}"


def tally(desk: ReviewQueue) -> dict[str, int]:
    """Return the number of rows in a queue, and the number of rows in each state."""
    states = [row.state for row in review_queue.review_states(desk.queue)] if desk.queue else []
    counts = {name: states.count(name) for name in ("open", "second", "disputed", "settled")}
    return {"rows": len(states), **counts}


def label(row: ReviewState, name: str) -> str:
    """Return the label of a row for the person `name`.

    It is "todo" as long as the person is to review the row, whatever others have decided; else the final
    verdict of a settled row, or the state of one that is not settled.
    """
    if row.due(name):
        return "todo"
    return row.verdict["verdict"] if row.state == "settled" else row.state


def _disagreement(row: ReviewState) -> dict[str, Any]:
    """Return the template values of a row with two different verdicts.

    They are these verdicts and the resolution, a final verdict; it is missing as long as the row is disputed.
    """
    resolution = row.resolution
    if resolution:
        resolution = _shown_verdict(row, resolution["reviewer"], resolution)
    return {
        "row": row,
        "said": [_shown_verdict(row, name, entry) for name, entry in row.verdicts.items()],
        "resolution": resolution,
    }


def _shown_verdict(row: ReviewState, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the template values of a verdict.

    They are its reviewer `name`, the fields of the stored `entry`, and for an edit the changed passages.
    """
    passages = []
    if entry["verdict"] == "edit":
        passages = edits.difference(row.row["completion"], entry["completion"])
    return {"name": name, **entry, "passages": passages}


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class RowView:
    """A row as one person sees it.

    `name` is the person's name, and `query` what they asked to see. `due` is True if they are to review the
    row, `resolve` if they are to resolve a disagreement on it. `draft` is theirs; it may be empty.
    """

    at: QueueRow
    name: str
    query: RowQuery
    due: bool
    resolve: bool
    draft: Draft

    @property
    def reviewing(self) -> bool:
        """True if the person may decide on the row: it is due, or its disagreement is to be resolved."""
        return self.due or self.resolve

    @property
    def editing(self) -> bool:
        """True if the edit form is open: the address asks for it, or there is a draft of an edited text."""
        opened = self.query.edit or bool(self.draft.text and not self.query.read)
        return self.reviewing and opened and not self.query.reject

    @property
    def rejecting(self) -> bool:
        """True if the reject form is open: the address asks for it, or the draft has only a reason."""
        drafted = self.draft.reason and not self.draft.text
        opened = self.query.reject or bool(drafted and not self.query.read)
        return self.reviewing and opened and not self.query.edit

    @property
    def text(self) -> str:
        """The text in the edit form.

        It is the text of the draft, else the edited text among the verdicts that disagree if the person is to
        resolve the disagreement, else the row's own text.
        """
        return self.draft.text or self._disputed_edit() or self.at.completion

    def _disputed_edit(self) -> str:
        if not self.resolve:
            return ""
        verdicts = self.at.row.verdicts.values()
        return next((entry["completion"] for entry in verdicts if entry["verdict"] == "edit"), "")

    def verdicts(self) -> list[dict[str, Any]]:
        """Return the template values of the verdicts that the person may see.

        These are all verdicts if the row is settled or disputed and not due for this person, else only their
        own.
        """
        row = self.at.row
        visible = row.verdicts
        if self.due or row.state not in ("settled", "disputed"):
            visible = {name: entry for name, entry in row.verdicts.items() if name == self.name}
        return [_shown_verdict(row, name, entry) for name, entry in visible.items()]

    def form_values(self) -> dict[str, Any]:
        """Return the template values of the edit form and of the reject form."""
        reasons = self.draft.reason.split(SEPARATOR)
        return {
            "editing": self.editing,
            "rejecting": self.rejecting,
            "draft": self.draft,
            "text": self.text,
            "change": self.at.change(self.text),
            "reasons": REASONS,
            "why": set(reasons),
            "reason": SEPARATOR.join(reason for reason in reasons if reason not in REASONS),
        }

    def row_values(self) -> dict[str, Any]:
        """Return the template values of the row, its text and its visible verdicts."""
        row = self.at.row
        parts = edits.parts(self.at.completion)
        blocks = [list(edits.marked(part, self.at.language)) for part in parts]
        return {
            "desk": self.at.desk,
            "row": row,
            "here": address(self.at.desk),
            "asked": self.reviewing,
            "resolve": self.resolve,
            "due": self.due,
            "mine": row.verdicts.get(self.name),
            "finding": queue_list.verify(self.at.desk, row.row, self.at.completion),
            "blocks": blocks,
            "mixed": any(kind == "strange" for block in blocks for _, kind in block),
            "said": self.verdicts(),
            "resolution": None if self.due else row.resolution,
        }

    def progress_values(self) -> dict[str, Any]:
        """Return the template values of the person's progress: numbers of rows, and the row reviewed last."""
        rows = review_queue.review_states(self.at.desk.queue)
        left = sum(row.due(self.name) for row in rows)
        return {
            "total": len(rows),
            "done": len(rows) - left,
            "left": left,
            "last": _last_reviewed(rows, self.query.after, self.name),
        }


def _add_rows(router: APIRouter, pages: ReviewPages) -> None:
    Row = Annotated[QueueRow, Depends(pages.row)]

    @router.get("/{run}/{stage}/{number}")
    def show(request: Request, at: Row, person: SignedIn, query: Annotated[RowQuery, Depends()]) -> Response:
        view = _row_view(pages.drafts, at, person, query)
        return render(
            request,
            "desk_row.html.jinja",
            models=pages.model_names(),
            focus=_focused(request),
            **view.row_values(),
            **view.form_values(),
            **view.progress_values(),
        )

    @router.post("/{run}/{stage}/{number}")
    def decide(at: Row, person: SignedIn, decision: Annotated[Decision, Depends()]) -> Response:
        at.check_unchanged(decision.id)
        if decision.resolves and at.row.state != "disputed":
            raise HTTPException(409, "this row has changed since the page was opened; open it again")
        try:
            review_queue.review(at.desk.queue, decision.entry(at.row, person))
        except LimbeckError as error:
            raise HTTPException(400, str(error)) from None
        pages.drafts.drop(at.key(person))
        if decision.resolves:
            target = f"{address(at.desk)}/disagreements"
        else:
            number = at.row.number
            target = f"{pages.next_address(at.desk, person, number)}?after={number}"
        return RedirectResponse(target, 303, background=_resume_later(at.desk))

    @router.post("/{run}/{stage}/{number}/undo")
    def undo(at: Row, person: SignedIn) -> Response:
        review_queue.undo(at.desk.queue, at.row.id, person.name)
        return RedirectResponse(at.address, 303)


def _row_view(drafts: Drafts, at: QueueRow, person: Person, query: RowQuery) -> RowView:
    """Return the view of a row for a person.

    If the person is to review the row, it is held for them, so that others are offered other rows.
    """
    due = at.row.due(person.name)
    resolve = query.resolve and at.row.state == "disputed"
    draft = None
    if due or resolve:
        draft = drafts.find(at.key(person))
    if due:
        drafts.hold(at.key(person))
    return RowView(at, person.name, query, due, resolve, draft or Draft())


def _last_reviewed(rows: Sequence[ReviewState], number: int, name: str) -> ReviewState | None:
    """Return the row of this number if the person `name` has a verdict on it, else None.

    The page offers to undo that verdict.
    """
    if not 1 <= number <= len(rows):
        return None
    row = rows[number - 1]
    return row if name in row.verdicts else None


def _focused(request: Request) -> bool:
    """True if the person has chosen to hide everything on the page but the row."""
    return request.cookies.get("desk_focus") == "1"


# ---------------------------------------------------------------- drafts and tools


def _add_drafts(router: APIRouter, pages: ReviewPages) -> None:
    Row = Annotated[QueueRow, Depends(pages.row)]

    @router.post("/{run}/{stage}/{number}/draft")
    def draft(
        request: Request,
        at: Row,
        person: SignedIn,
        row_id: Annotated[str, Body(alias="id")],
        text: Annotated[str | None, Body()] = None,
        reason: Annotated[str | None, Body()] = None,
    ) -> Response:
        """Store the text or the reason of a draft, or both.

        None keeps what was stored before. The response shows the changes to the row's text, as HTML.
        """
        at.check_unchanged(row_id)
        stored = pages.drafts.find(at.key(person)) or Draft()
        if text is None:
            text = stored.text
        elif text == at.completion:
            text = ""
        if reason is None:
            reason = stored.reason
        pages.drafts.save(at.key(person), Draft(text, reason))
        return render(request, "desk_change.html.jinja", change=at.change(text or at.completion))

    @router.post("/{run}/{stage}/{number}/discard")
    def discard(at: Row, person: SignedIn) -> Response:
        pages.drafts.drop(at.key(person))
        return RedirectResponse(at.address, 303)


def _add_text_tools(router: APIRouter, pages: ReviewPages) -> None:
    Row = Annotated[QueueRow, Depends(pages.row)]

    @router.post("/{run}/{stage}/{number}/trim")
    def trim(at: Row, text: str = Body(embed=True)) -> dict[str, str]:
        return {"text": edits.trimmed(text)}

    @router.post("/{run}/{stage}/{number}/translate")
    async def translate(at: Row, text: str = Body(), model: str = Body("")) -> dict[str, str]:
        """Return a translation of a row's text.

        It is made by the task if that can translate, else by the served model `model`.
        """
        translation = await run_in_threadpool(queue_list.rewrite_thought, at.desk, at.row.row, text)
        if translation is None:
            translation = await _translate(pages, model, text, at.language)
        return {"text": translation}

    @router.post("/{run}/{stage}/{number}/steps")
    def work_out(at: Row) -> dict[str, str]:
        """Return the response that the policy `steps` proposes for a row."""
        proposal = queue_list.propose_steps(at.desk, at.row.row)
        if proposal is None:
            raise HTTPException(400, "the question asks for no sum that could be worked out")
        return {"text": proposal}


async def _translate(pages: ReviewPages, model: str, text: str, language: str) -> str:
    """Return a model's translation of the thought in a text, or of the whole text if it has no thought.

    `language` is the language to translate into. Raises an HTTPException with status 400 if no model is
    served or the model gives no translation.
    """
    names = pages.model_names()
    if not names:
        raise HTTPException(400, "this task cannot translate, and no model is served here that could")
    if model not in names:
        model = names[0]
    thought = queue_list.split_thought(text).thought
    prompt = TRANSLATE.format(language=LANGUAGES.get(language, language), thought=thought or text)
    messages = [{"role": "user", "content": prompt}]
    try:
        output = await pages.state.service.answer(model, messages, temperature=TRANSLATION_TEMPERATURE)
    except LimbeckError as error:
        raise HTTPException(400, str(error)) from None
    if not output.answer.strip():
        raise HTTPException(400, "the model gave no translation")
    if thought:
        return queue_list.replace_thought(text, output.answer)
    return output.answer.strip()


# ---------------------------------------------------------------- the run


def _resume_later(desk: ReviewQueue) -> BackgroundTask:
    """Return a task that calls `resume_if_complete` after the response has been sent."""
    return BackgroundTask(resume_if_complete, desk)


def resume_if_complete(desk: ReviewQueue) -> None:
    """Resume a run that waits for reviews, if no row of the queue is left to review.

    A run whose process is still at work finds the finished reviews itself.
    """
    if review_queue.complete(desk.queue) and jobs.state(desk.run).name in ("waits", ""):
        with suppress(LimbeckError):
            jobs.resume(desk.run)
