"""The arena's pages: a blind battle and its vote, the leaderboard, and what the votes are good for."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
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
from ..votes import Battle, Refused, VoteStore

Control = Literal["", "length", "style"]
WINNERS = {
    "a": "model_a",
    "b": "model_b",
    "tie": "tie",
    "bad": "tie (bothbad)",
}  # as Chatbot Arena's published votes call them


def routes(site: AppState) -> APIRouter:
    """All of `/arena`."""
    ballots = VoteStore(site.studio_folder)
    ring = Arena(site.service, ballots, Questions(site.runs, site.studio_folder / "sets"))
    room = APIRouter(prefix="/arena", include_in_schema=False)
    _add_battles(room, ring)
    _add_board(room, ring)
    _add_exports(room, ballots)
    return room


def told(route: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """What a route refuses becomes a page that says why, and leads back."""

    @wraps(route)
    async def answer(request: Request, **given: Any) -> Response:
        try:
            return await route(request=request, **given)
        except Refused as error:
            return render(
                request,
                "arena_refused.html.jinja",
                error.status,
                why=say(language_of(request), f"arena.{error.key}"),
            )
        except LimbeckError as error:
            return render(request, "arena_refused.html.jinja", 400, why=str(error))

    return answer


def voter(request: Request) -> str:
    """The name that a vote is signed with."""
    return signed_in(request).name


# ---------------------------------------------------------------- battles


def _add_battles(room: APIRouter, ring: Arena) -> None:
    @room.get("")
    @told
    async def start(request: Request) -> Response:
        name = voter(request)

        def page() -> Response:
            return render(
                request,
                "arena.html.jinja",
                fighters=ring.fighters(),
                sets=ring.questions.names(),
                waiting=ring.ballots.waiting(name),
            )

        return await run_in_threadpool(page)

    @room.post("")
    @told
    async def begin(
        request: Request,
        prompt: str = Form("", max_length=20_000),
        set: str = Form("", max_length=300),
        who: list[str] = Form([]),  # noqa: B008
    ) -> Response:
        if not prompt.strip() and not set:
            raise Refused("nothing", 400)
        wish = {"prompt": prompt, "set": set, "who": who}
        battle = await run_in_threadpool(ring.draw, voter(request), wish)
        ring.attend(battle)
        return _to(battle)

    @room.get("/b/{battle_id}")
    @told
    async def look(request: Request, battle_id: str) -> Response:
        name = voter(request)
        battle = await run_in_threadpool(ring.ballots.battle, battle_id)
        own = battle.voter == name
        failed = own and not ring.attend(battle)
        return await run_in_threadpool(
            render, request, "arena_battle.html.jinja", battle=battle, own=own, failed=failed
        )

    @room.post("/b/{battle_id}")
    @told
    async def vote(
        request: Request,
        battle_id: str,
        token: str = Form(max_length=100),
        outcome: str = Form(max_length=10),
    ) -> Response:
        await run_in_threadpool(ring.ballots.vote, battle_id, token, voter(request), outcome)
        return RedirectResponse(f"/arena/b/{battle_id}", 303)

    @room.post("/sets")
    @told
    async def bring(request: Request, file: UploadFile) -> Response:
        voter(request)
        await run_in_threadpool(ring.questions.add, file.filename or "prompts", await file.read())
        return RedirectResponse("/arena", 303)


def _to(battle: Battle) -> Response:
    return RedirectResponse(f"/arena/b/{battle.id}", 303)


# ---------------------------------------------------------------- the leaderboard


def _add_board(room: APIRouter, ring: Arena) -> None:
    @lru_cache(32)
    def shown(total: int, language: str, control: Control) -> dict[str, Any]:
        """Votes are only ever added: with as many of them, all is as it was."""
        votes = ring.ballots.votes()
        board = _board([vote for vote in votes if language in ("", vote.language)], control)
        return {**board, "languages": sorted({vote.language for vote in votes})}

    @room.get("/board")
    @told
    async def board(request: Request, language: str = "", control: Control = "") -> Response:
        voter(request)

        def page() -> Response:
            total = len(ring.ballots)
            return render(
                request,
                "arena_board.html.jinja",
                **shown(total, language, control),
                language=language,
                control=control,
                total=total,
                broken=ring.ballots.broken(),
                judging=dict(ring.judging),
                served=sorted(ring.served()),
            )

        return await run_in_threadpool(page)

    @room.post("/judge")
    @told
    async def judge(request: Request, name: str = Form(max_length=300)) -> Response:
        voter(request)
        ring.call(name)
        return RedirectResponse("/arena/board#judges", 303)


def _board(votes: list[Vote], control: Control) -> dict[str, Any]:
    """What the leaderboard shows: ratings by people and, apart from them, by each judge; and who voted."""
    people = rate((vote for vote in votes if not vote.judge), control)
    judges = {
        told["judge"]: rate((v for v in votes if v.judge and v.voter == told["judge"]), control)
        for told in judged(votes)
    }
    return {
        "people": people,
        "judges": judges,
        "scale": _scale([people, *judges.values()]),
        "voters": examine(votes),
        "beside": judged(votes),
    }


def _scale(ratings: list[Ratings]) -> Callable[[float], float]:
    """From points to the 0 to 100 of a drawing that holds every interval."""
    ends = [end for rated in ratings for one in rated.models for end in (one.low, one.high)] or [1000.0]
    low, high = min(ends), max(ends)
    return lambda points: round(2 + 96 * (points - low) / max(high - low, 1.0), 2)


# ---------------------------------------------------------------- to take away


def _add_exports(room: APIRouter, ballots: VoteStore) -> None:
    @room.get("/preferences.jsonl")
    def preferences(judge: str = "") -> Response:
        return _lines(ballots.preferences(judge), "preferences.jsonl")

    @room.get("/votes.jsonl")
    def votes() -> Response:
        rows = (
            {
                "model_a": v.a,
                "model_b": v.b,
                "winner": WINNERS[v.outcome],
                "judge": v.voter,
                "human": not v.judge,
                "language": v.language,
                "tstamp": v.when,
                "question_id": v.battle,
            }
            for v in ballots.votes()
            if v.outcome
        )
        return _lines(rows, "votes.jsonl")


def _lines(rows: Iterator[dict[str, Any]], name: str) -> Response:
    text = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return StreamingResponse(
        text,
        media_type="application/jsonl",
        headers={"content-disposition": f'attachment; filename="{name}"'},
    )
