"""The command `limbeck arena`, which rates models by the votes that people and judges (models that compare
two answers) gave.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import RUNS, AsJson, Home, print_rows, usage_error

if TYPE_CHECKING:
    from ..eval.arena_ratings import Vote
    from ..serve.votes import VoteStore

app = typer.Typer()


@app.command()
def arena(
    runs: Home = RUNS,
    language: Annotated[
        str, typer.Option(help="questions in this language only: en, zh", show_default=False)
    ] = "",
    control: Annotated[
        str,
        typer.Option(
            help="leave out what answers gain by their length, or by their style", show_default=False
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="write people's preferences to this JSONL file instead, for reward and calibrate stages",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The arena's leaderboard: ratings from people's votes and, apart from them, from each judge's, with 95 %
    intervals.
    """
    from ..eval.arena_ratings import CONTROLS

    store = _open_votes(runs)
    if control not in CONTROLS:
        choices = " or ".join(filter(None, CONTROLS))
        raise usage_error(f"--control {control}: choose {choices}")
    if out:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in store.preferences()]
        out.write_text("".join(lines), encoding="utf-8")
        print(out)
        return
    votes = [vote for vote in store.votes() if language in ("", vote.language)]
    print_rows(_leaderboard(votes, control), as_json, _rating_line)


def _open_votes(runs: Path) -> VoteStore:
    """Return the store of the arena's votes, which lie in the folder `.studio` of `runs`.

    Raises a usage error if nobody has voted there.
    """
    from ..serve.votes import FILE, VoteStore

    folder = runs / ".studio"
    if not (folder / FILE).exists():
        raise usage_error(
            f"{folder / FILE} does not exist; nobody has voted there yet: "
            "the arena opens with `limbeck serve`"
        )
    return VoteStore(folder)


def _leaderboard(votes: Sequence[Vote], control: str) -> list[dict[str, Any]]:
    """Return one row for each voter group and model: the model's rating with its interval, rank and number of
    votes.

    The rows rated by people come first, with `judge` None; the rows of each judge follow, with the judge's
    name. `control` names the property of answers (their length or style) whose effect is left out of the
    ratings; "" for none.
    """
    from dataclasses import asdict

    from ..eval.arena_ratings import rate

    people = [vote for vote in votes if not vote.judge]
    by_voter: dict[str | None, list[Vote]] = {None: people}
    for judge in sorted({vote.voter for vote in votes if vote.judge}):
        by_voter[judge] = [vote for vote in votes if vote.judge and vote.voter == judge]
    rows = []
    for judge, cast in by_voter.items():
        rows += [{"judge": judge or None, **asdict(rating)} for rating in rate(cast, control).models]
    return rows


def _rating_line(row: dict[str, Any]) -> str:
    """Return one row of `_leaderboard` as a line of text."""
    voter = row["judge"] or "people"
    rating = f"{row['rating']:6.0f} [{row['low']:.0f}, {row['high']:.0f}]"
    return f"{voter:16} {row['rank']:3} {row['model']:28} {rating} {row['votes']:6} votes {row['share']:5.0%}"
