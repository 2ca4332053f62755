"""A recipe's forecast: its stages' tokens at measured rates on its workers, and the stored forecast."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from limbeck.cli import recipe_plan
from limbeck.config.load import load
from limbeck.model.config import ModelConfig
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.store import Store
from limbeck.plan import cluster as clusters
from limbeck.plan import forecast, machine_rates, stage_work
from limbeck.plan.forecast import Forecast, wall
from limbeck.plan.machine_rates import Asked, Rates
from limbeck.plan.stage_work import Walk
from limbeck.types import LimbeckError

ROOT = Path(__file__).parent.parent
# of three runs of the quickstart (seeds 0 to 2): tokens that each stage sampled and learned, least and most
SEEN = {
    "base": (1.80e6, 1.80e6), "zero": (1.67e6, 1.78e6), "traces": (199e3, 202e3), "dev1": (129e3, 153e3),
    "dev2": (567e3, 629e3),
    "reasoning": (231e3, 238e3), "dev3": (387e3, 418e3), "r1": (259e3, 289e3), "outputs": (228e3, 245e3),
    "small_base": (4.0e6, 4.0e6),
    "evaluation/base": (61e3, 63e3), "evaluation/zero": (204e3, 219e3), "evaluation/small": (200e3, 205e3),
    "evaluation/small_answers": (17.6e3, 17.7e3), "evaluation/base+forced": (141e3, 153e3),
}  # fmt: skip


def walked(name: str, tmp_path: Path, overrides: tuple[str, ...] = ()) -> tuple[Walk, Graph]:
    path = ROOT / "limbeck" / "recipes" / f"{name}.yaml"
    graph = Graph(load(path, overrides), Store(tmp_path / "store"), path.parent)
    walk = Walk(graph.recipe, recipe_plan.model_configs(graph))
    for node in graph.nodes.values():
        walk.add(node.name, node.stage, node.inputs, node.control)
    return walk, graph


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    return walked("quickstart", tmp_path_factory.mktemp("quickstart"))[0]


def even(asked: dict[str, Asked]) -> Rates:
    """A machine that takes 20 us for a token learned, 10 us for one sampled and 1 ms for a step."""
    roll = {"8": 1e-3 + 8e-5, "256": 1e-3 + 256e-5}
    models = {
        name: [
            {"layers": one.layers[0], "learn": {"1000": 0.02, "4000": 0.08}, "roll": roll if one.rows else {}}
        ]
        for name, one in asked.items()
    }
    return Rates(
        1e11,
        1e10,
        3.0,
        {"clock": 2e-6},
        models,
        {name: one.config.layers for name, one in asked.items()},
        dict.fromkeys(asked, 1e4),
    )


@pytest.mark.parametrize("stage", SEEN)
def test_tokens_of_the_quickstart(quickstart, stage):
    effort = quickstart.efforts[stage]
    tokens = effort.sampled + effort.learned
    low, high = SEEN[stage]
    assert 0.7 * low < tokens < 1.35 * high


def test_time_of_the_quickstart_is_the_sum_of_its_parts(quickstart):
    asked = forecast.asked_of(quickstart.efforts.values(), quickstart.configs)
    rates = even(asked)
    foreseen = {
        name: forecast.price(effort, quickstart.configs, rates) for name, effort in quickstart.efforts.items()
    }
    base = foreseen["base"]
    assert base.parts["learning"] == pytest.approx(1.8e6 * 20e-6, rel=0.05) and base.parts[
        "writing the corpus"
    ] == pytest.approx(1.8e6 * 2e-6)
    assert base.seconds == pytest.approx(sum(base.parts.values())) and base.low < base.seconds < base.high
    assert (
        foreseen["zero"].high / foreseen["zero"].low > base.high / base.low
    )  # lengths are less sure than a corpus
    one, two = (wall(foreseen, workers) for workers in (1, 2))
    assert one == pytest.approx(sum(f.seconds for f in foreseen.values())) and one / 2 < two < one
    assert json.loads(json.dumps(base.told()))["binds"].startswith("learning")


def test_a_budget_ends_a_stage(tmp_path):
    """`small_rl` stops when it has spent what `small` took."""
    walk, _ = walked("quickstart", tmp_path)
    small, rl = walk.efforts["small"], walk.efforts["small_rl"]
    assert rl.flops(walk.configs["small_rl"]) == pytest.approx(small.flops(walk.configs["small"]), rel=0.05)
    assert rl.rollouts[0].calls < 150


@pytest.mark.parametrize("name", ["smoke", "bakeoff", "moe", "specialists", "expert", "harder", "judge"])
def test_every_recipe_can_be_foreseen(name, tmp_path):
    try:
        walk, graph = walked(name, tmp_path)
    except LimbeckError as error:
        pytest.skip(str(error))
    rates = even(forecast.asked_of(walk.efforts.values(), walk.configs))
    foreseen = {n: forecast.price(effort, walk.configs, rates) for n, effort in walk.efforts.items()}
    assert set(foreseen) == set(graph.nodes) and all(
        f.seconds >= 0 and f.low <= f.seconds <= f.high for f in foreseen.values()
    )
    learning = [
        n for n, node in graph.nodes.items() if node.kind in ("pretrain", "rl", "sft", "distill", "dpo")
    ]
    assert learning and all(
        foreseen[n].parts.get("learning", 0) > 0 and foreseen[n].flops > 0 for n in learning
    )


def test_named_benchmarks_are_counted(tmp_path):
    """Two responses to each of AIME's 30 problems; four options of each of GPQA's 198 questions are read."""
    walk, graph = walked("smoke", tmp_path)
    bare = walk.efforts["evaluation/zero"]
    suites = (
        "{aime-2024: {data: d, samples: 2, max_new_tokens: 100}, gpqa-diamond: {data: d, protocol: lm-eval}}"
    )
    recipe = load(ROOT / "limbeck/recipes/smoke.yaml", [f"stages.evaluation.suites={suites}"])
    walk.benchmarks = recipe_plan.benchmarks_of(recipe)
    asked, ranked = walk.benchmarks["evaluation"]
    assert (asked.items, asked.samples, asked.limit, asked.options) == (30, 2, 100, 0)
    assert (ranked.items, ranked.samples, ranked.options) == (198, 0, 4)
    node = graph.nodes["evaluation/zero"]
    full = walk.add(node.name, node.stage, node.inputs, node.control)
    middle = stage_work.REACHED["learned"][1]
    assert full.sampled - bare.sampled == pytest.approx(30 * 2 * middle * 100)
    assert (full.read, full.reader) == (pytest.approx(198 * 4 * ranked.prompt), "zero")
    assert recipe_plan.benchmarks_of(graph.recipe) == {"evaluation": []}


def test_people_are_asked_where_no_policy_decides(tmp_path):
    apply_reviews, apply_policy = (
        walked("smoke", tmp_path, extra)[0] for extra in ((), ("stages.coldstart.auto=true",))
    )
    assert apply_reviews.efforts["coldstart"].people > 0 == apply_policy.efforts["coldstart"].people


def test_teachers_are_paid_for(tmp_path):
    walk, _ = walked("bakeoff", tmp_path)
    taught = [e for e in walk.efforts.values() if e.kind == "distill" and e.reader]
    assert taught and all(e.read > 0 and e.reader in walk.configs for e in taught)


def test_stages_wait_for_one_another_and_for_workers():
    def stage(name: str, seconds: float, *inputs: str) -> Forecast:
        return Forecast(name, "rl", seconds, seconds, seconds, {}, "", 0, 0, 0, inputs)

    chain = {f.stage: f for f in (stage("a", 10), stage("b", 5, "a"), stage("c", 7), stage("d", 1, "b", "c"))}
    assert wall(chain, 1) == 23 and wall(chain, 2) == 16 and wall(chain, 8) == 16
    assert wall(chain, 2, start=3) == 19


def test_a_large_model_is_drawn_out_from_two_depths():
    learn = {2: {"64": 0.2, "192": 0.4}, 4: {"64": 0.3, "192": 0.6}}
    rates = Rates(
        1,
        1,
        1,
        {},
        {"m": [{"layers": n, "learn": learn[n], "roll": {"8": 0.01 * n, "64": 0.02 * n}} for n in (2, 4)]},
        {"m": 30},
        {"m": 0},
    )
    assert rates.learn("m", 192) == pytest.approx(0.4 + 14 * 0.2) and rates.learn("m", 64) == pytest.approx(
        0.2 + 14 * 0.1
    )
    assert rates.learn("m", 320) == pytest.approx(0.6 + 14 * 0.3) and rates.step("m", 64) == pytest.approx(
        0.6
    )
    heavy = replace(
        rates, gemm=1e3, memory=1e5, weights={"m": 500}
    )  # a layer: 8 x 1,000 / 1e3 = 8 s, or 4 x 500 / 1e5 = 0.02 s at least
    assert heavy.step("m", 8) == pytest.approx(0.02 + 28 * 8) and heavy.learn("m", 64) == pytest.approx(
        0.2 + 28 * 6 * 64 * 0.5
    )
    assert replace(heavy, gemm=1e9).step("m", 8) == pytest.approx(0.02 + 28 * 0.02)
    large = Asked(
        ModelConfig("llama", 49152, 576, 30, 9, 3, 64, 1536), "adamw", (500, 2000), 50, (8, 64), 45, 20
    )
    assert large.layers == [2, 10] and large.request()["config"]["layers"] == 0
    assert (
        replace(large, length=70, prompt=30).request() == large.request()
    )  # nothing is measured twice for that


@pytest.mark.slow
def test_what_was_measured_is_remembered(tmp_path, monkeypatch):
    """A real measurement of a tiny model, in a process that has torch; this one has no need of it."""
    monkeypatch.setattr(machine_rates, "user_cache_path", lambda name: tmp_path)
    config = ModelConfig("llama", 32, 16, 1, 2, 1, 8, 32, max_positions=256)
    asked = {"m": Asked(config, "adamw", (64, 128), 16, (8, 16), 4, 8)}
    assert machine_rates.measure(asked, {}, 1, ask=False) is None
    rates = machine_rates.measure(asked, {}, 1)
    assert rates.gemm > 1e8 and rates.memory > 1e8 and rates.learn("m", 128) > 0 and rates.step("m", 16) > 0
    monkeypatch.setattr(machine_rates, "_probe", lambda *_: pytest.fail("measured twice"))
    assert machine_rates.measure(asked, {}, 1) == rates == machine_rates.measure(asked, {}, 1, ask=False)


@pytest.mark.parametrize(("load", "kept"), [(0.2, True), (50.0, False)])
def test_what_was_measured_beside_other_programs_is_not_remembered(load, kept, tmp_path, monkeypatch):
    answer = {"gemm": 1.0, "memory": 1.0, "start": 1.0, "models": {}, "worlds": {}}
    monkeypatch.setattr(machine_rates, "user_cache_path", lambda name: tmp_path)
    monkeypatch.setattr(machine_rates, "_probe", lambda *_: answer)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert machine_rates.measure({}, {}, 2) == machine_rates.Rates(1.0, 1.0, 1.0, {}, {}, {}, {})
    assert (machine_rates.measure({}, {}, 2, ask=False) is not None) == kept
    machine_rates.measure({}, {}, 1)  # in CPU time, which others hardly affect
    assert machine_rates.measure({}, {}, 1, ask=False) is not None


def test_a_probe_that_fails_ends_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_rates, "user_cache_path", lambda name: tmp_path)
    monkeypatch.setattr(machine_rates, "PROBE", "limbeck.runtime.no_such_probe")
    with pytest.raises(LimbeckError, match="could not be measured: .*no_such_probe"):
        machine_rates.measure({}, {}, 1)


def test_the_same_recipe_on_other_chips(quickstart):
    few, many = (clusters.cluster(text) for text in ("1x4090", "8x4090"))
    for effort in (quickstart.efforts["zero"], quickstart.efforts["base"]):
        one, eight = (forecast.price_on(effort, quickstart.configs, cluster) for cluster in (few, many))
        assert 0 < eight.seconds <= one.seconds and one.low < one.seconds < one.high


def test_the_report_sets_the_forecast_against_what_happened(tmp_path):
    """Stages that were not foreseen are left out; a run without a forecast has none."""
    from limbeck.report import i18n
    from limbeck.report.loaded_run import Run
    from limbeck.report.report import StageView, _forecast

    stages = tuple(
        StageView(name, "rl", "", tmp_path, {"seconds": 12.0, "cpu_seconds": 11.0}, ())
        for name in ("zero", "other")
    )
    told = Forecast("zero", "rl", 10.0, 7.0, 15.0, {"rollout": 10.0}, "rollout: 100%", 1, 1).told()
    found = _forecast(Run(stages, {}, {"forecast": {"stages": {"zero": told}}}))
    assert (
        found["seconds"] == 10.0
        and found["took"] == 12.0
        and found["processor"] == 11.0
        and [s["name"] for s in found["stages"]] == ["zero"]
    )
    said = i18n.foreseen(found)
    assert "10 s" in said.en and "12 s" in said.en and "11" in said.zh
    assert _forecast(Run(stages, {}, {})) is None


def test_a_run_keeps_what_was_foreseen_before_its_stages_began(tmp_path):
    """A second forecast counts for what is still to come."""
    from limbeck.pipeline.run import FORECAST

    job = type("Job", (), {"folder": tmp_path, "graph": type("G", (), {"nodes": {}})()})()
    node = lambda artifact: type("Node", (), {"artifact": artifact})()
    job.graph.nodes = {"base": node(None), "zero": node(None)}
    from limbeck.pipeline.run import Run

    Run._keep_forecast(job, {"schema": 1, "stages": {"base": {"seconds": 1}, "zero": {"seconds": 2}}})
    job.graph.nodes["base"] = node(object())
    Run._keep_forecast(job, {"schema": 1, "stages": {"base": {"seconds": 8}, "zero": {"seconds": 9}}})
    assert json.loads((tmp_path / FORECAST).read_text())["stages"] == {
        "base": {"seconds": 1},
        "zero": {"seconds": 9},
    }
    Run._keep_forecast(job, None)
