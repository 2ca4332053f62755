"""The people who vote in an arena: disagreement with other voters, preference for one side of the screen,
haste, and influence on the ratings.

An array counts_3 or total_3 has, for a pair of models in alphabetical order, the number of votes in which
the first model lost, tied and won."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from ..types import generator
from .arena_ratings import WORTH, Ratings, Vote, rate
from .judge_calibration import agreement

SIGNIFICANCE = 0.05  # probability that any honest voter is marked, for each of the two tests
PERMUTATIONS = 4999  # random draws of the test of agreement
TIE_TOLERANCE = 1e-9  # of a statistic: a draw that equals the observation but for rounding counts as equal
HOUR = 3600  # seconds
_NAMES = {"a": "first", "b": "second"}


@dataclass(frozen=True)
class Voter:
    """What one person's votes show: `Voter("Mei", 80, .71, .44, .52, .74, 12.5, 31, 4.2, "", ())`.

    `agreement` is the share of other people's votes on the same pairs of models that equal this person's;
    `p` is the probability of at most this agreement if all voters were alike. Both are None if nobody else
    voted on those pairs. `side` is the share of side A among the votes that prefer a side, `p_side` the
    two-sided p-value of that share. `seconds` is the median time from the answers to a vote, `busiest` the
    largest number of votes within an hour. If this person's votes were left out, no rating would change by
    more than `shift` points, and `leader` would be the best model (empty if it stays the same). `odd` names
    the tests that the person fails: `disagrees`, `side`."""

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
    """Examine all people who voted, those with the most votes first. Votes of judges are ignored.

    A person fails a test if its p-value is below `SIGNIFICANCE` divided by the number of voters (Bonferroni
    correction)."""
    votes = [vote for vote in votes if vote.outcome in WORTH and not vote.judge]
    counts = Counter(vote.voter for vote in votes)
    ratings = rate(votes)
    tables = _tables(votes)
    voters = []
    for name, _ in counts.most_common():
        own = [vote for vote in votes if vote.voter == name]
        share, p = _agreement(tables[name], tables[""], name)
        side, p_side = _side(own)
        shift, leader = _without(votes, name, ratings)
        times = [vote.seconds for vote in own if vote.seconds is not None]
        voter = Voter(
            name=name,
            votes=len(own),
            agreement=share,
            p=p,
            side=side,
            p_side=p_side,
            seconds=median(times) if times else None,
            busiest=_busiest([vote.when for vote in own]),
            shift=shift,
            leader=leader,
            odd=_odd({"disagrees": p, "side": p_side}, len(counts)),
        )
        voters.append(voter)
    return voters


def judged(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Compare each judge with the people who voted on the same battles (comparisons of two answers).

    The result has one dictionary for each judge with the keys `judge` (its name), `votes`, `abstained`,
    `both` (the number of votes on battles that a person voted on as well) and, if `both` is not 0, the
    `agreement` and Cohen's `kappa` with intervals. The outcome "both are bad" counts as a tie, as in the
    ratings."""
    labels = {vote.battle: _label(vote) for vote in votes if not vote.judge}
    judges: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote.judge:
            judges[vote.voter].append(vote)
    return [_compare(name, judges[name], labels) for name in sorted(judges)]


def _compare(name: str, votes: Sequence[Vote], labels: Mapping[str, str]) -> dict[str, Any]:
    """Compare the votes of the judge `name` with `labels`, the outcome that people gave to each battle, by
    battle id."""
    people = []
    verdicts = []
    for vote in votes:
        if vote.outcome and vote.battle in labels:
            people.append(labels[vote.battle])
            verdicts.append(_label(vote))
    measures = agreement(people, verdicts) if people else {}
    return {
        "judge": name,
        "votes": len(votes),
        "abstained": sum(not vote.outcome for vote in votes),
        "both": len(people),
        **measures,
    }


def _label(vote: Vote) -> str:
    """Return the outcome of a vote as `first`, `second` or `tie`."""
    return _NAMES.get(vote.outcome, "tie")


def _tables(votes: Sequence[Vote]) -> dict[str, dict[tuple, np.ndarray]]:
    """Count the votes of each voter and, under the name "", of all voters together.

    For each pair of models in alphabetical order, the counts [3] say how often the first model lost, tied
    and won."""
    tables = defaultdict(lambda: defaultdict(lambda: np.zeros(3, dtype=np.int64)))
    for vote in votes:
        pair = min((vote.a, vote.b), (vote.b, vote.a))
        worth = WORTH[vote.outcome]
        if vote.a != pair[0]:
            worth = 1 - worth
        for name in (vote.voter, ""):
            tables[name][pair][int(2 * worth)] += 1
    return tables


def _agreement(
    own: Mapping[tuple, np.ndarray], everybody: Mapping[tuple, np.ndarray], name: str
) -> tuple[float | None, float | None]:
    """Return the share of the other voters' votes that equal this person's, and the p-value of a permutation
    test; both None if no pair was voted on by others.

    `own` and `everybody` map each pair of models to the counts [3] of this person's and of all votes. The
    null hypothesis is that all voters are alike: then one person's votes on a pair are a random draw,
    without replacement, from all votes on that pair. `name` seeds the draws."""
    shared = []
    for pair, counts_3 in sorted(own.items()):
        total_3 = everybody[pair]
        if total_3.sum() > counts_3.sum():
            shared.append((counts_3, total_3))
    if not shared:
        return None, None
    rng = generator("voters", name)
    votes = same = observed = drawn = 0
    for counts_3, total_3 in shared:
        others_3 = total_3 - counts_3
        count = counts_3.sum()
        total = total_3.sum()
        votes += count
        same += counts_3 @ others_3 / others_3.sum()
        observed += counts_3 @ total_3 / total
        draws = rng.multivariate_hypergeometric(total_3, count, PERMUTATIONS, method="marginals")
        drawn += draws @ total_3 / total
    no_more = (drawn <= observed + TIE_TOLERANCE).sum()
    return float(same / votes), float((1 + no_more) / (PERMUTATIONS + 1))


def _side(votes: Iterable[Vote]) -> tuple[float | None, float]:
    """Return the share of side A among the votes that prefer a side (None if there are none), and the
    p-value of its binomial test."""
    from scipy.stats import binomtest

    outcomes = Counter(vote.outcome for vote in votes)
    first = outcomes["a"]
    decided = first + outcomes["b"]
    if not decided:
        return None, 1.0
    return first / decided, float(binomtest(first, decided).pvalue)


def _odd(chances: Mapping[str, float | None], voters: int) -> tuple[str, ...]:
    """Return the names of the tests whose p-value is significant after correction for the number of voters.
    `chances` has the p-value of each test."""
    odd = []
    for name, chance in chances.items():
        if chance is not None and chance * voters < SIGNIFICANCE:
            odd.append(name)
    return tuple(odd)


def _without(votes: Sequence[Vote], name: str, full: Ratings) -> tuple[float, str]:
    """Return the largest change of any rating, in points, when a person's votes are left out, and the model
    that would then be best ("" if it stays the same). `full` are the ratings with all votes."""
    rest = rate(vote for vote in votes if vote.voter != name)
    shift = 0.0
    for rating in rest.models:
        before = full.of(rating.model)
        if before:
            shift = max(shift, abs(rating.rating - before.rating))
    if not rest.models:
        return shift, ""
    leader = rest.models[0].model
    return shift, "" if leader == full.models[0].model else leader


def _busiest(times: Sequence[float]) -> int:
    """Return the largest number of votes within any hour. `times` are Unix times."""
    ordered = np.sort(np.array(times))
    ends = np.searchsorted(ordered, ordered + HOUR)
    counts = ends - np.arange(len(ordered))
    return int(counts.max(initial=0))
