"""Serving: DeepSeek's day to the dollar, the bounds of decoding, V3's rates, and models that do not fit."""

from __future__ import annotations

import pytest

from limbeck.plan import cluster as clusters
from limbeck.plan import models
from limbeck.plan.collectives import decode_bound
from limbeck.plan.inference import Day, Replica, production, unit_cost
from limbeck.types import LimbeckError


@pytest.fixture(scope="module")
def v3():
    config, cluster = models.find("deepseek-v3"), clusters.cluster("2048xH800")
    return lambda chips: Replica(config, cluster, chips, "fp8")


def test_the_day_to_the_dollar():
    day = Day()
    assert day.cost == 87_072 and round(day.revenue) == 562_100
    assert day.revenue == pytest.approx(562_027, rel=2e-4)  # theirs, before the tokens were rounded
    assert int(100 * day.margin) == 545
    prefill, decode = day.nodes_needed
    assert prefill == pytest.approx(95.5, abs=0.05) and decode == pytest.approx(131.4, abs=0.05)
    assert prefill + decode == pytest.approx(226.75, rel=1e-3) and prefill / (
        prefill + decode
    ) == pytest.approx(0.42, abs=0.005)
    assert day.hits == pytest.approx(0.563, abs=1e-3)


def test_unit_costs():
    assert unit_cost(16, 73.7e3, 14.8e3) == pytest.approx((0.060, 0.300), abs=5e-4)
    assert unit_cost(16, 100e3, 50e3) == pytest.approx((0.044, 0.089), abs=5e-4)  # V2 by its report's rates


@pytest.mark.parametrize(
    ("hidden", "bandwidth", "layer", "speed"),
    [(7e3, 50e9, 120.96e-6, 67), (7168, 50e9, 123.86e-6, 66.1), (7e3, 900e9, 6.72e-6, 1200)],
)
def test_bound_of_decoding_by_the_network(hidden, bandwidth, layer, speed):
    """2505.09343, section 2.3.2: 67 tokens/s by InfiniBand (66.1 with the true width), 1,200 on NVL72."""
    found, token = decode_bound(hidden=hidden, bandwidth=bandwidth)
    assert found == pytest.approx(layer, rel=1e-3) and 1 / token == pytest.approx(speed, rel=0.02)


def test_v3_on_h800(v3):
    """The profiles were fitted; 14.8k of production was not, nor its users' speed (20 to 22 tokens/s)."""
    assert v3(32).prefill(4096).tokens == pytest.approx(7839, rel=0.15)
    assert v3(128).decode(128, 4200).tokens == pytest.approx(2324, rel=0.15)
    rows, decode = v3(144).at_speed(21, 4989)
    into, out = production(v3(32).prefill(4096), decode, Day().hits)
    assert into == pytest.approx(73.7e3, rel=0.15) and out == pytest.approx(14.8e3, rel=0.15)
    assert rows == pytest.approx(1850 / 21, rel=0.15)


def test_decoding_behaves(v3):
    unit = v3(144)
    assert (
        unit.decode(64, 4096).tokens > unit.decode(16, 4096).tokens
        and unit.decode(64, 4096).seconds > unit.decode(16, 4096).seconds
    )
    assert unit.decode(64, 32768).seconds > unit.decode(64, 4096).seconds
    assert unit.most_rows(4096) > unit.most_rows(8192) > 0
    fast = Replica(unit.config, clusters.cluster("2048xH800", nic=800), 144, "fp8")
    assert fast.decode(128, 4096).tokens > unit.decode(128, 4096).tokens


def test_what_cannot_be_served(v3):
    qwen = models.find("r1-distill-qwen-7b")
    with pytest.raises(LimbeckError, match="do not fit on 8 x 4090"):
        Replica(models.find("deepseek-v3"), clusters.cluster("8x4090"), 8, "fp8")
    with pytest.raises(LimbeckError, match="8x4090 has 8"):
        Replica(qwen, clusters.cluster("8x4090"), 16)
    with pytest.raises(LimbeckError, match="fp8 TFLOPS is not known"):
        Replica(qwen, clusters.cluster("8xA100"), 1, "fp8").decode(8, 1024)
    with pytest.raises(LimbeckError, match="no conversation gets 500"):
        v3(144).at_speed(500, 4096)


def test_dense_models_split_over_chips():
    qwen, node = models.find("r1-distill-qwen-7b"), clusters.cluster("8xH100")
    one, two = Replica(qwen, node, 1), Replica(qwen, node, 2)
    assert two.decode(32, 4096).seconds < one.decode(64, 4096).seconds
    assert one.held == pytest.approx(2 * qwen.parameters, rel=0.01) and two.held == pytest.approx(
        one.held / 2, rel=0.01
    )
