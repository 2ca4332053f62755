"""The arena's pages: battles and their votes, the leaderboard, and exports of the votes.

A battle shows the answers of two models to one prompt, without the models' names until the vote.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import lru_cache, wraps
from typing import Any, Literal

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response, StreamingResponse

from ...eval.arena_ratings import Ratings, Vote, rate
from ...eval.voters import examine, judged
from ...types import LimbeckError
from ..app_state import AppState, signed_in
from ..arena import Arena
from ..pages import language_of, render, say
from ..questions import Questions
from ..votes import IDENTICAL, Refused, VoteStore

Control = Literal["", "length", "style"]
WINNERS = {
    "a": "model_a",
    "b": "model_b",
    "tie": "tie",
    "bad": "tie (bothbad)",
}  # the values of Chatbot Arena's published votes
MEAN_RATING = 1000.0  # Elo points


def routes(state: AppState) -> APIRouter:
    """Return the router of all pages under `/arena`."""
    votes = VoteStore(state.studio_folder)
    questions = Questions(state.runs, state.studio_folder / "sets")
    arena = Arena(state.service, votes, questions)
    router = APIRouter(prefix="/arena", include_in_schema=False)
    _add_battles(router, arena)
    _add_votes(router, arena)
    _add_leaderboard(router, arena)
    _add_exports(router, votes)
    return router


def with_error_page(route: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """Wrap a route so that `Refused` and LimbeckError become a page that shows the reason."""

    @wraps(route)
    async def handle(request: Request, **parameters: Any) -> Response:
        try:
            return await route(request=request, **parameters)
        except Refused as error:
            reason = say(language_of(request), f"arena.{error.key}")
            return render(request, "arena_refused.html.jinja", error.status, why=reason)
        except LimbeckError as error:
            return render(request, "arena_refused.html.jinja", 400, why=str(error))

    return handle


def voter_name(request: Request) -> str:
    """Return the name that signs a vote: that of the request's session.

    Without a session, raises an HTTPException that redirects to the page that asks for a name.
    """
    return signed_in(request).name


# ---------------------------------------------------------------- battles


def _add_battles(router: APIRouter, arena: Arena) -> None:
    @router.get("")
    @with_error_page
    async def start(request: Request) -> Response:
        name = voter_name(request)

        def page() -> Response:
            return render(
                request,
                "arena.html.jinja",
                fighters=arena.contestants(),
                sets=arena.questions.names(),
                waiting=arena.votes.waiting(name),
            )

        return await run_in_threadpool(page)

    @router.post("")
    @with_error_page
    async def begin(
        request: Request,
        prompt: str = Form("", max_length=20_000),
        prompt_set: str = Form("", alias="set", max_length=300),
        who: list[str] = Form([]),  # noqa: B008
    ) -> Response:
        if not prompt.strip() and not prompt_set:
            raise Refused("nothing", 400)
        options = {"prompt": prompt, "set": prompt_set, "who": who}
        battle = await run_in_threadpool(arena.draw, voter_name(request), options)
        arena.ensure_answers(battle)
        return _to_battle(battle.id)

    @router.post("/sets")
    @with_error_page
    async def upload(request: Request, file: UploadFile) -> Response:
        voter_name(request)
        content = await file.read()
        await run_in_threadpool(arena.questions.add, file.filename or "prompts", content)
        return RedirectResponse("/arena", 303)


def _add_votes(router: APIRouter, arena: Arena) -> None:
    @router.get("/b/{battle_id}")
    @with_error_page
    async def show(request: Request, battle_id: str) -> Response:
        name = voter_name(request)
        battle = await run_in_threadpool(arena.votes.battle, battle_id)
        own = battle.voter == name
        failed = own and not arena.ensure_answers(battle)
        return await run_in_threadpool(
            render, request, "arena_battle.html.jinja", battle=battle, own=own, failed=failed
        )

    @router.post("/b/{battle_id}")
    @with_error_page
    async def vote(
        request: Request,
        battle_id: str,
        token: str = Form(max_length=100),
        outcome: str = Form(max_length=10),
    ) -> Response:
        await run_in_threadpool(arena.votes.vote, battle_id, token, voter_name(request), outcome)
        return _to_battle(battle_id)


def _to_battle(battle_id: str) -> Response:
    return RedirectResponse(f"/arena/b/{battle_id}", 303)


# ---------------------------------------------------------------- the leaderboard


def _add_leaderboard(router: APIRouter, arena: Arena) -> None:
    @lru_cache(32)
    def leaderboard(total: int, language: str, control: Control) -> dict[str, Any]:
        """Return the leaderboard's template values.

        `total` is the number of all votes; it is only a part of the cache's key. Since votes are never
        changed or removed, an equal number means the same votes. `language` selects the votes on prompts of
        one language, empty all votes.
        """
        votes = arena.votes.votes()
        selected = [vote for vote in votes if language in ("", vote.language)]
        languages = sorted({vote.language for vote in votes})
        return {**_leaderboard(selected, control), "languages": languages}

    @router.get("/board")
    @with_error_page
    async def board(request: Request, language: str = "", control: Control = "") -> Response:
        voter_name(request)

        def page() -> Response:
            total = len(arena.votes)
            return render(
                request,
                "arena_board.html.jinja",
                **leaderboard(total, language, control),
                language=language,
                control=control,
                total=total,
                broken=arena.votes.broken(),
                judging=dict(arena.judging),
                served=sorted(arena.served()),
            )

        return await run_in_threadpool(page)

    @router.post("/judge")
    @with_error_page
    async def judge(request: Request, name: str = Form(max_length=300)) -> Response:
        voter_name(request)
        arena.start_judge(name)
        return RedirectResponse("/arena/board#judges", 303)


def _leaderboard(votes: Sequence[Vote], control: Control) -> dict[str, Any]:
    """Return the leaderboard's template values.

    They are ratings by people and by each judge, and statistics of the voters. `control` selects what the
    ratings are corrected for: "length", "style", or nothing if it is empty.
    """
    people = rate((vote for vote in votes if not vote.judge), control)
    by_people = [vote for vote in votes if vote.voter != IDENTICAL]
    agreements = judged(by_people)
    judges: dict[str, Ratings] = {}
    for agreement in agreements:
        name = agreement["judge"]
        judges[name] = rate((vote for vote in votes if vote.judge and vote.voter == name), control)
    return {
        "people": people,
        "judges": judges,
        "scale": _scale([people, *judges.values()]),
        "voters": examine(by_people),
        "identical": sum(vote.voter == IDENTICAL for vote in votes),
        "beside": agreements,
    }


def _scale(ratings: Iterable[Ratings]) -> Callable[[float], float]:
    """Return a function that maps Elo points to a position from 0 to 100 in a drawing.

    The drawing is wide enough for the confidence intervals of all ratings.
    """
    ends: list[float] = []
    for table in ratings:
        for rating in table.models:
            ends += [rating.low, rating.high]
    low = min(ends, default=MEAN_RATING)
    high = max(ends, default=MEAN_RATING)
    return lambda points: round(2 + 96 * (points - low) / max(high - low, 1.0), 2)


# ---------------------------------------------------------------- exports


def _add_exports(router: APIRouter, store: VoteStore) -> None:
    @router.get("/preferences.jsonl")
    def preferences(judge: str = "") -> Response:
        return _json_lines(store.preferences(judge), "preferences.jsonl")

    @router.get("/votes.jsonl")
    def votes() -> Response:
        rows = (_exported(vote) for vote in store.votes() if vote.outcome)
        return _json_lines(rows, "votes.jsonl")


def _exported(vote: Vote) -> dict[str, Any]:
    """Return a vote as a row with the columns of the votes that Chatbot Arena has published."""
    return {
        "model_a": vote.a,
        "model_b": vote.b,
        "winner": WINNERS[vote.outcome],
        "judge": vote.voter,
        "human": not vote.judge and vote.voter != IDENTICAL,
        "language": vote.language,
        "tstamp": vote.when,
        "question_id": vote.battle,
    }


def _json_lines(rows: Iterator[dict[str, Any]], name: str) -> Response:
    """Return a response that downloads rows as a JSONL file of this name."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(lines, media_type="application/jsonl", headers=headers)
