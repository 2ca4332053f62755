"""Prices, energy and goodput: dated tables, metered energy, circular figures found, Daly's optimum."""

from __future__ import annotations

import pytest

from limbeck.plan import prices
from limbeck.plan.energy import circular, spend
from limbeck.plan.goodput import Reliability, checkpoint_interval, goodput, useful_share
from limbeck.types import LimbeckError


def test_rents_are_dated_and_ranged():
    rent = prices.rental("H800")
    assert rent.low == 2.0 <= rent.middle <= rent.high and rent.date and rent.source
    assert prices.rental("H100-SXM-80GB", until="2025-12").high == 4.8 and prices.rental("H100").high == 3.99
    assert prices.rental("910B", 1.5).middle == pytest.approx(1.5)


def test_no_price_is_guessed():
    with pytest.raises(LimbeckError, match="910B: no dated price.*--price"):
        prices.rental("910B")
    with pytest.raises(LimbeckError, match="H100: no dated price"):
        prices.rental("H100", until="2019-01")
    with pytest.raises(LimbeckError, match="deepseek-r1"):
        prices.tariff("gpt-9")


def test_the_two_lists_of_r1_agree():
    dollars, yuan = prices.tariff("deepseek-r1"), prices.tariff("deepseek-r1", "CNY")
    assert yuan.output == pytest.approx(dollars.output, rel=0.02) and yuan.cached == pytest.approx(
        dollars.cached, rel=0.02
    )


def test_the_claim_of_a_seventh_does_not_match_the_dated_table():
    """V2's own table has Llama-3-70B 27 times as dear, by input; a seventh is another host's price."""
    cheap, dear = prices.tariff("deepseek-v2"), prices.tariff("llama-3-70b")
    assert dear.input / cheap.input == pytest.approx(27, rel=0.01)
    assert dear.output / cheap.output > 20


def test_prices_without_a_source_are_refused(tmp_path, monkeypatch):
    table = tmp_path / "prices.yaml"
    table.write_text("rental:\n  - {chip: X1, low: 1, high: 2, currency: USD, date: 2025-01}\n")
    monkeypatch.setattr(prices, "TABLE", table)
    prices._tables.cache_clear()
    with pytest.raises(LimbeckError, match="no source"):
        prices.rental("X1")
    monkeypatch.undo()
    prices._tables.cache_clear()


def test_metered_energy_of_gpt3():
    """1,287 MWh by the meter: 10,000 V100 for 14.8 days at 330 W and PUE 1.10 (2104.10350, Table 4)."""
    energy = spend("V100", 300, 10_000 * 14.8 * 24, 1.1)
    assert energy.kwh == pytest.approx(1_287_000, rel=0.01) and energy.low < 1_287_000 < energy.high
    unmeasured = spend("H800", 700, 1e6)
    assert unmeasured.low < 700 * 1e6 / 1e3 < unmeasured.high


@pytest.mark.parametrize(("kwh", "hours", "watts"), [(449e3, 1_022_362, 400), (30.84e6 * 0.7, 30.84e6, 700)])
def test_circular_energy_is_found(kwh, hours, watts):
    """LLaMA-65B's 449 MWh and any hours times the label; GPT-3's meter is not."""
    assert "not a measurement" in circular(kwh, hours, watts)
    assert circular(1_287_000, 10_000 * 14.8 * 24, 300, 1.1) == ""


def test_the_checkpoint_interval_is_the_best_one():
    reliability = Reliability(save_seconds=20, restart_seconds=300)
    best = checkpoint_interval(20, reliability.mean_seconds(4096))
    shares = {factor: useful_share(4096, reliability, best * factor) for factor in (0.5, 0.8, 1.0, 1.25, 2)}
    assert max(shares, key=shares.get) == 1.0
    assert checkpoint_interval(20, 1e7) == pytest.approx(
        (2 * 20 * 1e7) ** 0.5, rel=0.01
    )  # Young's, where failures are rare


def test_goodput_of_published_runs():
    """Llama 3.1: 7.8 unexpected interruptions a day on 16,384 chips and more than 90 % effective; V3 lost
    next to nothing."""
    llama, v3 = goodput(16384), goodput(2048)
    assert llama.failures_per_day == pytest.approx(419 / 54) and 0.9 < llama.share < 0.95
    assert v3.share > 0.97 and v3.low < v3.share < v3.high < 1
    assert goodput(8).share > 0.999 and goodput(100_000).share < llama.share
