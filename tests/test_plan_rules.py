"""Export rules: the thresholds of 2022 and 2023 at their boundaries, dates, chiplets, weights, gaps."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from limbeck.plan import chips
from limbeck.plan.export_rules import Chip, Die, Memory, Weights, judge, ware
from limbeck.types import LimbeckError

A100 = Chip("A100", (Die({16: 312, 8: 624}, 826),), 600, 2039)
A800 = replace(A100, name="A800", io_gb_s=400)
H100 = Chip("H100", (Die({16: 989.4, 8: 1978.9}, 814),), 900, 3350)
H800 = replace(H100, name="H800", io_gb_s=400)
H20 = Chip("H20", (Die({16: 148, 8: 296}, 814),), 900, 4000)
RTX4090 = Chip("4090", (Die({16: 330.3}, 608.5),), 64, 1008, "consumer")
EARLY, LATE = date(2023, 6, 1), date(2024, 6, 1)


@pytest.mark.parametrize(
    ("chip", "on", "decision", "clause"),
    [
        (A100, EARLY, "licence", "3A090 of 2022"),
        (A800, EARLY, "free", ""),
        (H100, EARLY, "licence", "3A090 of 2022"),
        (H800, EARLY, "free", ""),
        (A100, LATE, "licence", "3A090.a.1"),
        (A800, LATE, "licence", "3A090.a.1"),
        (H100, LATE, "licence", "3A090.a.1"),
        (H800, LATE, "licence", "3A090.a.1"),
        (H20, LATE, "free", ""),
        (H20, date(2025, 4, 8), "free", ""),
        (H20, date(2025, 4, 9), "licence", "letter"),
        (RTX4090, EARLY, "free", ""),
        (RTX4090, LATE, "licence", "3A090.a.1"),
        (H800, date(2023, 11, 16), "free", ""),
        (H800, date(2023, 11, 17), "licence", "3A090.a.1"),
        (H100, date(2022, 10, 6), "free", ""),
        (H100, date(2026, 2, 1), "review", "91 FR 1684"),
        (H20, date(2026, 2, 1), "licence", "letter"),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_chips_to_china(chip, on, decision, clause):
    verdict = judge(chip, "China", on)
    assert verdict.decision == decision and clause in verdict.clause and verdict.enforced
    assert "free" in verdict.sentence if decision == "free" else verdict.source in verdict.sentence


def test_figures_of_the_known_chips():
    assert A100.tpp == 4992 and H20.tpp == 2368
    assert H100.density == pytest.approx(19.4, abs=0.1) and H20.density == pytest.approx(2.9, abs=0.05)


def dense(tpp: float, density: float, market: str = "datacentre") -> Chip:
    return Chip("made up", (Die({8: tpp / 8}, tpp / density),), 100, 1000, market)


@pytest.mark.parametrize(
    ("tpp", "density", "clause"),
    [
        (4800, 1.0, "3A090.a.1"),  # 600 TOPS at 8 bits: the bureau's own example
        (4799, 1.0, ""),
        (1600, 5.92, "3A090.a.2"),
        (1600, 5.91, "3A090.b.2"),
        (1599, 5.92, ""),
        (2400, 1.6, "3A090.b.1"),
        (2400, 1.59, ""),
        (2399, 3.19, ""),
        (1600, 3.2, "3A090.b.2"),
        (1600, 3.19, ""),
    ],
)
def test_boundaries_of_2023(tpp, density, clause):
    verdict = judge(dense(tpp, density), "china", LATE)
    assert verdict.clause.endswith(clause) if clause else verdict.decision == "free"


def test_what_is_not_for_data_centres_is_outside_below_4800():
    assert judge(dense(4799, 9, "consumer"), "china", LATE).decision == "free"
    assert judge(dense(4799, 9), "china", LATE).decision == "licence"


def test_both_tests_of_2022_are_needed():
    assert judge(replace(A100, io_gb_s=599), "china", EARLY).decision == "free"
    assert judge(dense(4799, 6), "china", EARLY).decision == "free"


def test_dies_of_a_package_add_up_and_planar_dies_do_not_dilute():
    die = Die({8: 300}, 400)
    alone, pair = Chip("one", (die,), 100, 1000), Chip("two", (die, die), 100, 1000)
    assert pair.tpp == 2 * alone.tpp == 4800 and pair.density == alone.density == 6.0
    assert judge(alone, "china", LATE).clause.endswith("a.2") and judge(pair, "china", LATE).clause.endswith(
        "a.1"
    )


def test_destinations():
    for country, decision in {
        "Hong Kong": "licence",
        "uae": "licence",
        "Japan": "free",
        "united states": "free",
        "Israel": "free",
    }.items():
        assert judge(H100, country, LATE).decision == decision
    assert judge(H100, "uae", EARLY).decision == "free"  # in 2022 China alone
    with pytest.raises(LimbeckError, match="Atlantis"):
        judge(H100, "Atlantis", LATE)


def test_a_missing_figure_is_a_mistake_where_it_would_decide():
    unknown = Chip("910X", (Die({16: 150}),), None, None)
    with pytest.raises(LimbeckError, match="910X: its performance density is not known"):
        judge(unknown, "china", LATE)
    with pytest.raises(LimbeckError, match="GB/s of transfer is not known"):
        judge(replace(unknown, dies=(Die({16: 320}),)), "china", EARLY)
    assert (
        judge(replace(unknown, dies=(Die({16: 320}),)), "china", LATE).decision == "licence"
    )  # whatever the density
    assert judge(replace(unknown, dies=(Die({16: 90}),)), "china", LATE).decision == "free"


def test_weights():
    on = date(2025, 3, 1)
    closed = judge(Weights("closed", 1.01e26), "japan", on)
    assert closed.clause == "ECCN 4E091" and not closed.enforced and "never enforced" in closed.sentence
    assert judge(Weights("at the line", 1e26), "japan", on).decision == "free"
    assert judge(Weights("open", 5e26, published=True), "china", on).decision == "free"
    assert judge(Weights("like one that is open", 2e26, best_published=2e26), "china", on).decision == "free"
    assert judge(Weights("closed", 1.01e26), "china", date(2025, 6, 1)).decision == "free"


def test_a_rule_that_was_never_enforced_says_so():
    verdict = judge(H100, "Switzerland", date(2025, 3, 1))
    assert verdict.decision == "licence" and not verdict.enforced
    assert judge(H100, "China", date(2025, 3, 1)).enforced  # the rule of 2023 is the one that counts


def test_memory_by_itself():
    assert judge(Memory("HBM2E", 461, 110), "china", date(2025, 1, 1)).decision == "licence"
    assert judge(Memory("DDR5", 51, 100), "china", date(2025, 1, 1)).decision == "free"
    assert judge(Memory("HBM2E", 461, 110), "china", LATE).decision == "free"


@pytest.mark.parametrize(
    ("name", "early", "late"),
    [("a100", "licence", "licence"), ("a800", "free", "licence"), ("h100", "licence", "licence"),
     ("h800", "free", "licence"),
     ("h20", "free", "free"), ("4090", "free", "licence"), ("b200", "licence", "licence")],
)  # fmt: skip
def test_chips_of_the_catalogue(name, early, late):
    """The catalogue's figures lead to the same verdicts."""
    chip = ware(chips.find(name))
    assert judge(chip, "china", EARLY).decision == early and judge(chip, "china", LATE).decision == late


def test_a_package_of_two_dies_is_judged_as_one():
    b200 = ware(chips.find("b200"))
    assert len(b200.dies) == 2 and b200.tpp == 36000
    with pytest.raises(LimbeckError, match="chip 910b"):
        ware(chips.find("910b"))
