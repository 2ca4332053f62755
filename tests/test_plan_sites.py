"""Sites far apart: what averaging over thin links takes, against INTELLECT-1's table, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from limbeck.plan import cluster as clusters
from limbeck.plan import models, multi_site, runs
from limbeck.plan.runs import Workload
from limbeck.plan.step import Step
from limbeck.types import LimbeckError

LLAMA = models.find("llama-3.1-8b")


def step(seconds: float) -> Step:
    return Step(seconds, seconds, seconds, {"compute": seconds}, "", 1024.0, 8, 6e10, 1e15)


def test_a_ring_over_the_sites_by_hand():
    cluster = clusters.cluster("intellect-1")  # 14 sites, 4 Gbit/s, 100 ms
    assert multi_site.exchange(cluster, 10e9) == pytest.approx(2 * 13 / 14 * 10e9 / 0.5e9 + 26 * 0.1)
    assert multi_site.exchange(replace(cluster, fabric=replace(cluster.fabric, sites=1)), 10e9) == 0


@pytest.mark.parametrize(("seconds", "utilisation"), [(103, 0.957), (382, 0.856), (469, 0.830)])
def test_intellect_1s_utilisation(seconds, utilisation):
    """arXiv 2412.01152, Table 2: a hundred steps in 38 minutes, and what the average over all sites took
    beside them."""
    cluster = clusters.cluster("intellect-1", site_latency=0)
    link = 2 * 13 / 14 * LLAMA.parameters * 8 / seconds / 1e9
    whole, averaging = multi_site.averaged(
        step(22.8), LLAMA, replace(cluster, fabric=replace(cluster.fabric, site_link=link))
    )
    assert averaging.seconds == pytest.approx(seconds) and 1 - averaging.share == pytest.approx(
        utilisation, abs=0.001
    )
    assert whole.seconds == pytest.approx(22.8 + seconds / 100) and sum(
        whole.parts.values()
    ) == pytest.approx(whole.seconds)
    assert (whole.chips, whole.tokens) == (112, 14 * 1024) and averaging.plain > 2 * seconds


def test_a_run_on_two_sites_takes_what_one_of_them_takes_and_the_averaging():
    work = Workload("train", 1e12, 512, 8192)
    near, far = (
        runs.train(LLAMA, clusters.cluster("128xH100", **change), work, top=1)
        for change in ({"count": 64}, {"sites": 2, "site_link": 1})
    )
    half = runs.train(LLAMA, clusters.cluster("64xH100"), replace(work, batch=256), top=1)
    late = multi_site.exchange(clusters.cluster("128xH100", sites=2, site_link=1), LLAMA.parameters) / 100
    assert near.averaging is None and far.averaging.sites == 2
    assert far.choices[0].layout == half.choices[0].layout and far.choices[0].step.seconds == pytest.approx(
        half.choices[0].step.seconds + late
    )
    rare = runs.train(LLAMA, clusters.cluster("128xH100", sites=2, site_link=1, every=1000), work, top=1)
    assert (
        rare.averaging.share < far.averaging.share / 5 and rare.bill.seconds.middle < far.bill.seconds.middle
    )
    thin = runs.train(LLAMA, clusters.cluster("128xH100", sites=2, site_link=0.01), work, top=1)
    assert "averaging over sites" in thin.choices[0].step.binds


@pytest.mark.parametrize(("changes", "batch", "sentence"), [
    ({"sites": 3, "site_link": 1}, 512, "128 chips cannot be dealt evenly to 3 sites"),
    ({"sites": 2}, 512, "links of unknown speed; give it in Gbit/s, as site_link=10"),
    ({"sites": 2, "site_link": 1}, 511, "511 sequences a step cannot be dealt evenly to 2 sites"),
])  # fmt: skip
def test_what_cannot_be_is_said(changes, batch, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        runs.train(
            LLAMA, clusters.cluster("128xH100", **changes), Workload("train", 1e12, batch, 8192), top=1
        )
    with pytest.raises(LimbeckError, match="every=0: one at least"):
        clusters.cluster("8xH100", every=0)
