"""Whose votes an arena rests on: who disagrees with all others, prefers a side, votes in haste, or decides the order alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from ..types import generator
from .arena_ratings import WORTH, Vote, rate
from .judge_calibration import agreement

LEVEL = 0.05  # chance that anybody at all is marked without reason, for each of the two tests
DRAWS = 4999
_NAMES = {"a": "first", "b": "second"}


@dataclass(frozen=True)
class Voter:
    """What one person's votes look like: `Voter("Mei", 80, .71, .44, .52, .74, 12.5, 31, 4.2, "", ())`.

    `agreement` is the share of others' votes on the same pairs that say the same, and `p` the chance of agreeing no more than
    that if votes were anybody's (None where nobody else voted on those pairs). `side` is the share of A among their
    preferences with `p_side` of such a lean either way. `seconds` is the median time to a vote, `busiest` the most votes in
    an hour. Without them no rating changes by more than `shift` points, and `leader` would lead where somebody else does now.
    `odd` names what was found: `disagrees`, `side`.
    """

    name: str
    votes: int
    agreement: float | None
    p: float | None
    side: float | None
    p_side: float
    seconds: float | None
    busiest: int
    shift: float
    leader: str
    odd: tuple[str, ...]


def examine(votes: Sequence[Vote]) -> list[Voter]:
    """Every person who voted, most votes first. Chances below `LEVEL` over the number of voters (Bonferroni) are marked odd."""
    from scipy.stats import binomtest

    votes = [vote for vote in votes if vote.outcome in WORTH and not vote.judge]
    names, full = Counter(vote.voter for vote in votes), rate(votes)
    tables, found = _tables(votes), []
    for name, count in names.most_common():
        own = [vote for vote in votes if vote.voter == name]
        sides = Counter(vote.outcome for vote in own)
        decided = sides["a"] + sides["b"]
        share, p = _agreement(tables[name], tables[""], name)
        p_side = float(binomtest(sides["a"], decided).pvalue) if decided else 1.0
        shift, leader = _without(votes, name, full)
        times = [vote.seconds for vote in own if vote.seconds is not None]
        odd = [
            what
            for what, chance in (("disagrees", p), ("side", p_side))
            if chance is not None and chance * len(names) < LEVEL
        ]
        found.append(
            Voter(
                name,
                count,
                share,
                p,
                sides["a"] / decided if decided else None,
                p_side,
                median(times) if times else None,
                _busiest([vote.when for vote in own]),
                shift,
                leader,
                tuple(odd),
            )
        )
    return found


def judged(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Each judge beside the people who voted on the same battles: `judge`, `votes`, `abstained`, `both` and, where that is not
    0, `agreement` and Cohen's `kappa` with intervals. Both bad counts as a tie, as it does in the ratings."""
    people = {vote.battle: _NAMES.get(vote.outcome, "tie") for vote in votes if not vote.judge}
    found = []
    for name in sorted({vote.voter for vote in votes if vote.judge}):
        own = [vote for vote in votes if vote.judge and vote.voter == name]
        pairs = [
            (people[vote.battle], _NAMES.get(vote.outcome, "tie"))
            for vote in own
            if vote.outcome and vote.battle in people
        ]
        told = agreement(*zip(*pairs, strict=True)) if pairs else {}
        found.append(
            {
                "judge": name,
                "votes": len(own),
                "abstained": sum(not vote.outcome for vote in own),
                "both": len(pairs),
                **told,
            }
        )
    return found


def _tables(votes: Sequence[Vote]) -> dict[str, dict[tuple, np.ndarray]]:
    """By voter, and by "" for all of them: for each pair of models, how often the second won, tied and lost."""
    found: dict[str, dict[tuple, np.ndarray]] = defaultdict(
        lambda: defaultdict(lambda: np.zeros(3, dtype=np.int64))
    )
    for vote in votes:
        pair = min((vote.a, vote.b), (vote.b, vote.a))
        said = WORTH[vote.outcome] if vote.a == pair[0] else 1 - WORTH[vote.outcome]
        for name in (vote.voter, ""):
            found[name][pair][int(2 * said)] += 1
    return found


def _agreement(
    mine: Mapping[tuple, np.ndarray], everybodys: Mapping[tuple, np.ndarray], name: str
) -> tuple[float | None, float | None]:
    """How far the others say the same, and an exact test: if nobody differs, one person's votes on a pair are drawn from all
    votes on it without replacement."""
    shared = [
        (own, everybodys[pair]) for pair, own in sorted(mine.items()) if everybodys[pair].sum() > own.sum()
    ]
    if not shared:
        return None, None
    dice, met = generator("voters", name), sum(own.sum() for own, _ in shared)
    same = sum(own @ (total - own) / (total - own).sum() for own, total in shared)
    observed = sum(own @ total / total.sum() for own, total in shared)
    drawn = sum(
        dice.multivariate_hypergeometric(total, own.sum(), DRAWS, method="marginals") @ total / total.sum()
        for own, total in shared
    )
    return float(same / met), float((1 + (drawn <= observed + 1e-9).sum()) / (DRAWS + 1))


def _without(votes: Sequence[Vote], name: str, full: Any) -> tuple[float, str]:
    """The largest change of a rating if this person had not voted, and who would lead if that is somebody else."""
    rest = rate(vote for vote in votes if vote.voter != name)
    changes = [abs(rating.rating - old.rating) for rating in rest.models if (old := full.of(rating.model))]
    leads = rest.models[0].model if rest.models else ""
    return max(changes, default=0.0), leads if leads != full.models[0].model else ""


def _busiest(times: Sequence[float]) -> int:
    """The most votes within any hour."""
    ordered = np.sort(np.array(times))
    return int((np.searchsorted(ordered, ordered + 3600) - np.arange(len(ordered))).max(initial=0))
