"""Ratings: equal to an independent library's, near planted strengths, with honest intervals; and voters."""

from __future__ import annotations

import math

import choix
import numpy as np
import pytest

from limbeck.eval.arena_ratings import MIDDLE, POINTS, STYLE, Vote, draw_pair, rate, style_of
from limbeck.eval.voters import examine, judged

MODELS = ("base", "dev1", "r1", "small", "zero")
PLANTED = np.array([-0.9, -0.2, 0.8, 0.5, -0.2])  # mean 0


def cast(dice, count, strengths=PLANTED, ties=0.3, style=0.0, **rest):
    """Bradley and Terry's votes: a tie is half a win for both sides. `style` is length's weight in logits."""
    i = dice.integers(0, len(strengths), count)
    j = (i + dice.integers(1, len(strengths), count)) % len(strengths)
    longer = dice.uniform(-0.8, 0.8, count) + np.where(
        i < j, 0.3, -0.3
    )  # some models are wordier than others
    p = 1 / (1 + np.exp(strengths[j] - strengths[i] - style * longer))
    tie, draw = ties * 2 * np.minimum(p, 1 - p), dice.random(count)
    outcomes = np.where(draw < p - tie / 2, "a", np.where(draw < p + tie / 2, "tie", "b"))
    rows = zip(i, j, outcomes.tolist(), longer.tolist(), strict=True)
    return [
        Vote(MODELS[a], MODELS[b], said, **{"voter": "Mei", "style": (looks, 0.0, 0.0, 0.0), **rest})
        for a, b, said, looks in rows
    ]


def logits(ratings):
    return np.array(
        [(ratings.of(model).rating - MIDDLE) / POINTS for model in sorted(r.model for r in ratings.models)]
    )


@pytest.mark.parametrize("count", [3, 40, 800])
def test_ratings_are_those_of_an_independent_library(count):
    votes = cast(np.random.default_rng(count), count)
    models = sorted({m for v in votes for m in (v.a, v.b)})
    wins = (1 - np.eye(len(models))) / (len(models) - 1) / 2  # the tie that everybody is given
    for vote in votes:
        a, b = models.index(vote.a), models.index(vote.b)
        worth = {"a": 1.0, "tie": 0.5, "b": 0.0}[vote.outcome]
        wins[a, b] += worth
        wins[b, a] += 1 - worth
    theirs = choix.ilsr_pairwise_dense(wins, tol=1e-12, max_iter=10_000)
    assert np.abs(logits(rate(votes)) - (theirs - theirs.mean())).max() < 1e-6


def test_planted_ratings_are_recovered():
    found = rate(cast(np.random.default_rng(1), 20_000))
    assert np.abs(logits(found) - PLANTED).max() < 0.06
    assert [r.model for r in found.models][:2] == ["r1", "small"] and found.models[0].rank == 1
    assert np.mean([r.rating for r in found.models]) == pytest.approx(MIDDLE)


@pytest.mark.parametrize(("count", "ties"), [(40, 0.0), (40, 0.6), (300, 0.3)])
def test_intervals_hold_what_they_promise(count, ties):
    """Over 200 simulations of five models the planted rating lies inside in about 95 of 100 cases."""
    inside = []
    for seed in range(200):
        found = rate(cast(np.random.default_rng([count, seed]), count, ties=ties))
        planted = dict(zip(MODELS, PLANTED, strict=True))
        shown = np.mean([planted[r.model] for r in found.models])  # with few votes somebody may be missing
        inside += [r.low <= MIDDLE + POINTS * (planted[r.model] - shown) <= r.high for r in found.models]
    print(f"{count} votes, ties {ties}: {np.mean(inside):.3f}")
    assert 0.925 < np.mean(inside) < 0.985


def test_length_is_told_apart_from_strength():
    """Wordy models look strong if voters like words; with control they do not, and the intervals hold."""
    inside, plain, controlled = [], [], []
    for seed in range(200):
        votes = cast(np.random.default_rng([7, seed]), 300, np.zeros(5), style=3.0)
        fair = rate(votes, "length")
        plain.append(logits(rate(votes)))
        controlled.append(logits(fair))
        inside += [r.low <= MIDDLE <= r.high for r in fair.models]
    print(f"coverage under control {np.mean(inside):.3f}")
    assert np.mean(plain, 0)[0] > 0.4 and np.abs(np.mean(controlled, 0)).max() < 0.06
    assert 0.925 < np.mean(inside) < 0.985
    value, low, high = fair.style["length"]
    spread = math.sqrt(np.mean([v.style[0] ** 2 for v in votes]))
    assert low < 3.0 * spread * POINTS < high and low < value < high


def test_control_of_a_style_that_never_differs_changes_nothing():
    votes = [Vote(v.a, v.b, v.outcome, "Mei") for v in cast(np.random.default_rng(3), 200)]
    plain, controlled = rate(votes), rate(votes, "style")
    assert np.abs(logits(plain) - logits(controlled)).max() < 1e-5 and tuple(controlled.style) == STYLE
    assert controlled.models[0].low == pytest.approx(plain.models[0].low, abs=1e-3)


def test_swapping_sides_changes_nothing():
    votes = cast(np.random.default_rng(4), 100, style=1.0)
    other = {"a": "b", "b": "a", "tie": "tie"}
    swapped = [Vote(v.b, v.a, other[v.outcome], "Mei", style=tuple(-x for x in v.style)) for v in votes]
    for control in ("", "length", "style"):
        assert np.abs(logits(rate(votes, control)) - logits(rate(swapped, control))).max() < 1e-6


def test_whoever_won_everything_is_rated_all_the_same():
    found = rate([Vote("r1", "base", "a", "Mei")] * 5)
    best, worst = found.models
    assert (
        best.rating - worst.rating == pytest.approx(POINTS * math.log(5.5 / 0.5))
        and best.low < best.rating < best.high
    )
    assert best.low > worst.low and (best.share, worst.share, best.votes) == (1.0, 0.0, 5)
    # nobody is surely better after one vote
    assert {r.rank for r in rate([Vote("r1", "base", "a", "Mei")]).models} == {1}


def test_models_that_never_met_are_rated_with_doubt():
    votes = [Vote("a", "b", "a", "Mei"), Vote("a", "b", "b", "Mei")] * 50 + [
        Vote("c", "d", "a", "Mei"),
        Vote("c", "d", "b", "Mei"),
    ] * 50
    alone = rate(votes[:100]).models[0]
    both = rate(votes).models[0]
    assert both.high - both.low > 5 * (alone.high - alone.low)


def test_people_and_judges_are_never_mixed():
    with pytest.raises(ValueError, match="apart"):
        rate([Vote("r1", "base", "a", "Mei"), Vote("r1", "base", "a", "judge", judge=True)])
    assert rate([]).models == () and rate([Vote("r1", "base", "", "judge", judge=True)]).models == ()


def test_pairs_with_few_votes_meet_more_often():
    votes = [Vote("base", "r1", "a", "Mei"), Vote("base", "r1", "b", "Mei")] * 20
    drawn = [draw_pair(("base", "r1", "zero"), votes, np.random.default_rng(i)) for i in range(400)]
    often = {frozenset(pair): sum(set(other) == set(pair) for other in drawn) for pair in drawn}
    assert often.get(frozenset(("base", "r1")), 0) < 20 and len(often) >= 2
    assert 0.4 < np.mean([pair[0] < pair[1] for pair in drawn]) < 0.6  # sides are random


def test_style_is_counted():
    plain, fancy = "four", "# Answer\n\n- **four**\n- 4"
    assert style_of(plain, fancy)[1:] == (-1.0, -1.0, -1.0) and style_of(fancy, plain)[0] > 0.5
    assert style_of("", "") == (0.0,) * 4


# ---------------------------------------------------------------- voters


def crowd(seed=0, people=8, each=40):
    dice = np.random.default_rng(seed)
    return [vote for i in range(people) for vote in cast(dice, each, voter=f"p{i}", seconds=20.0)]


def stuffed(count=40, seed=0):
    """Somebody votes for `base` whatever it says; otherwise at random."""
    return [
        Vote(
            v.a,
            v.b,
            "a" if v.a == "base" else "b" if v.b == "base" else v.outcome,
            "shill",
            seconds=1.5,
            when=i,
        )
        for i, v in enumerate(cast(np.random.default_rng([seed, 9]), count, np.zeros(5)))
    ]


def test_a_ballot_stuffer_is_found_and_honest_people_are_not():
    found = {voter.name: voter for voter in examine([*crowd(), *stuffed()])}
    assert [name for name, voter in found.items() if voter.odd] == ["shill"]
    shill = found["shill"]
    assert "disagrees" in shill.odd and shill.p < 0.005 and shill.agreement < 0.45
    assert (shill.seconds, shill.busiest) == (1.5, 40)
    assert shill.shift > 2 * max(voter.shift for name, voter in found.items() if name != "shill")


def test_honest_people_are_seldom_suspected():
    """Of 12 crowds one has anybody marked, in expectation."""
    assert sum(any(voter.odd for voter in examine(crowd(seed))) for seed in range(12)) < 4


def test_a_side_preferred_is_found():
    lazy = [Vote(v.a, v.b, "a", "lazy") for v in cast(np.random.default_rng(5), 30)]
    found = {voter.name: voter for voter in examine([*crowd(), *lazy])}
    assert "side" in found["lazy"].odd and found["lazy"].side == 1.0


def test_who_votes_alone_cannot_be_compared():
    (voter,) = examine(cast(np.random.default_rng(6), 30))
    assert voter.agreement is None and voter.p is None and voter.leader == "" and voter.odd == ()
    assert voter.shift == 0.0  # there is nothing left to compare with


def test_a_leader_by_one_persons_votes_is_named():
    votes = [Vote("r1", "base", "a", "p1")] * 6 + [Vote("r1", "base", "b", "fan")] * 20
    assert {voter.name: voter.leader for voter in examine(votes)} == {"fan": "r1", "p1": ""}


def test_judges_stand_beside_people():
    people = [
        Vote("r1", "base", outcome, "Mei", battle=str(i)) for i, outcome in enumerate(["a", "b", "bad", "a"])
    ]
    judge = [
        Vote("r1", "base", outcome, "teacher", judge=True, battle=str(i))
        for i, outcome in enumerate(["a", "a", "tie", "", "b"])
    ]
    (told,) = judged([*people, *judge])
    assert (told["judge"], told["votes"], told["abstained"], told["both"]) == ("teacher", 5, 1, 3)
    assert told["agreement"]["mean"] == pytest.approx(2 / 3)
