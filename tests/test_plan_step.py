"""A step's forecast against what was published, what-ifs, the search, and the traps of public tables."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from limbeck.model.config import ModelConfig
from limbeck.plan import cost, gantt, search, verify
from limbeck.plan.cluster import cluster
from limbeck.plan.layout import Layout
from limbeck.plan.published import FILE, Row, read
from limbeck.plan.step import foresee
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parent.parent / "docs" / "models"
V3 = ModelConfig.from_directory(MODELS / "deepseek-v3.json")
QWEN = ModelConfig.from_directory(MODELS / "qwen2.5-72b.json")
OWN = Layout(dp=128, pp=16, ep=64, schedule="dualpipe", recompute="v3", overlap=True)
GPT3 = ModelConfig("llama", 51200, 12288, 96, 96, 96, 128, 49152, gated=False)
ROWS = read(FILE)


def rows(name: str, metric: str = "") -> list[Row]:
    return [row for row in ROWS if row.name.startswith(name) and row.metric.startswith(metric)]


@pytest.fixture(scope="module")
def v3():
    return foresee(V3, cluster("h800-2048"), OWN, 15360, 4096, "fp8").step()


def test_v3s_step_at_its_own_layout(v3):
    """19.926 s (arXiv 2505.09343, Table 4)."""
    assert v3.seconds == pytest.approx(19.926, rel=0.05) and v3.low < 19.926 < v3.high
    assert sum(v3.parts.values()) == pytest.approx(v3.seconds)
    assert v3.mfu == pytest.approx(0.3894, rel=0.05), "causal, against the 16-bit peak, MTP not counted"


def test_what_ifs_go_the_way_they_must(v3):
    def step(**changes: float) -> float:
        return foresee(V3, cluster("h800-2048", **changes), OWN, 15360, 4096, "fp8").step().seconds

    assert step(chip="h20") > 2 * v3.seconds
    assert step(nics=1) > 1.5 * v3.seconds, "an eighth of the network binds the all-to-all"
    assert step(nvlink=900) == pytest.approx(v3.seconds, rel=0.02), (
        "V3 was built so that the capped link does not bind"
    )
    dense = foresee(QWEN, cluster("64xh800"), Layout(dp=8, tp=8), 256, 4096).step()
    assert (
        foresee(QWEN, cluster("64xh100"), Layout(dp=8, tp=8), 256, 4096).step().seconds < 0.95 * dense.seconds
    )
    assert "tensor-parallel sums" in dense.binds


def test_without_overlap_the_all_to_all_binds():
    plain = foresee(
        V3, cluster("h800-2048"), OWN.change(schedule="1f1b", overlap=False), 15360, 4096, "fp8"
    ).step()
    assert plain.binds.startswith("all-to-all of experts") and plain.parts["experts"] > 0.25 * plain.seconds


def test_more_chips_are_faster_and_less_efficient():
    steps = [
        foresee(QWEN, cluster("1024xh100"), Layout(dp=n // 32, tp=8, pp=4), 1024, 4096).step()
        for n in (128, 256, 512, 1024)
    ]
    assert all(a.seconds > b.seconds > a.seconds / 2 for a, b in pairwise(steps))


@pytest.mark.parametrize(
    "name",
    ["Korthikanti gpt3-175b", "Korthikanti megatron-22b", "BLOOM 176B production", "Megatron-2021 GPT 18.4B"],
)
def test_dense_steps(name):
    errors = [verify.check(row).error for row in rows(name)]
    assert errors and max(errors) < 0.15


def test_the_search_is_quick_and_explains(tmp_path):
    begin = time.process_time()
    few = search.best(QWEN, cluster("2048xH800"), 2048, 4096)
    took = time.process_time() - begin
    print(f"search: {took:.1f} s of a processor")
    assert took < 10 * 4, "under 10 s on a quiet core; processors shared by many take longer"
    assert len(few) == 5 and few[0].step.seconds == min(choice.step.seconds for choice in few)
    assert all(choice.memory.fits and choice.layout.chips == 2048 for choice in few)
    assert "%" in few[0].tell() and "GB" in few[0].tell()
    assert gantt.trade(few, tmp_path / "trade.svg").read_text().startswith("<?xml")


def test_nothing_fits():
    with pytest.raises(LimbeckError, match="671G parameters do not fit 8 x 4090"):
        search.best(V3, cluster("8x4090"), 64, 4096)


# ------------------------------------------------------------ traps of public tables


def test_llama_table_4_multiplies_to_its_chips():
    """Its first version prints DP 4 for the long stage; 8 x 16 x 16 x DP is 16,384 only with 8."""
    assert all(row.layout.chips == row.chips for row in rows("Llama-3.1 405B stage"))


def test_efficiency_of_fire_flyer_at_512_is_the_figures_not_the_texts():
    seconds = {row.chips: row.value for row in rows("Fire-Flyer2 LLaMA-13B")}
    assert seconds[64] * 64 / (seconds[512] * 512) == pytest.approx(0.825, abs=0.001)
    assert seconds[64] * 64 / (seconds[256] * 256) == pytest.approx(0.92, abs=0.005)


def test_korthikanti_is_the_papers_not_another_models_forecast():
    assert sorted(row.value for row in rows("Korthikanti gpt3-175b", "step_time")) == [13.75, 18.13]
    (lean,) = [row for row in rows("Korthikanti gpt3-175b", "step_time") if row.value == 13.75]
    mfu = cost.flops_per_token(GPT3, 2048, "non-causal") * lean.batch * 2048 / 13.75 / 64 / 312e12
    assert mfu == pytest.approx(0.514, abs=0.005)


def test_hardware_utilisation_is_not_models():
    """BLOOM's 149.77 TFLOPS count recomputation: the same step as 104.7 s, and 110 TFLOPS of the model."""
    time_row, rate_row = (
        rows("BLOOM 176B production", "step_time")[0],
        rows("BLOOM 176B production", "hw_tflops")[0],
    )
    assert verify.measured_seconds(rate_row) == pytest.approx(time_row.value, rel=0.01)
    model = replace(rate_row, columns={**rate_row.columns, "measured_metric": "model_tflops_per_gpu"})
    assert verify.measured_seconds(model) == pytest.approx(0.75 * verify.measured_seconds(rate_row), rel=0.01)


def test_nemotron_has_its_published_batch():
    assert [row.batch for row in rows("Nemotron-4 340B n=6144")] == [2304]


def test_v3s_tokens_a_day_give_its_hours():
    (day,) = rows("DeepSeek-V3 671B step", "tokens_per_day")
    hours = 14.8e12 / (day.value * 1e9) * 24 * 2048
    assert hours == pytest.approx(rows("DeepSeek-V3 671B pretrain")[0].value, rel=0.005)
    assert verify.measured_seconds(day) == pytest.approx(19.926, rel=0.001)


def test_circular_and_undisclosed_figures_are_not_in_the_table():
    metrics = {row.metric for row in ROWS}
    assert not any(word in metric for metric in metrics for word in ("energy", "kwh", "dollar", "price"))
    assert all(row["source"] for row in ROWS) and not rows("Hunyuan")


def test_claims_are_computed_again():
    tenth, seventh, millions, nodes, day, yuan, bound, experts, energy = verify.claims()
    assert "1/17" in tenth and "9.2%" in tenth
    assert "1/27" in seventh and "$5.576 million" in millions
    assert "14,800 tokens" in nodes and "$87,072" in day and "545% more" in day and "95.5 + 131.4" in day
    assert (
        "$0.044 and $0.089" in yuan
        and "120.96 us" in bound
        and "12.8 experts" in experts
        and "not a measurement" in energy
    )


# ------------------------------------------------------------ the table itself


@pytest.fixture(scope="module")
def table():
    """All rows but those of whole runs, whose layouts are searched for."""
    return list(verify.checks([row for row in read() if not row.metric.startswith(("gpu_hours", "days"))]))


def test_the_table_of_steps_beats_the_constant():
    """A part of `limbeck plan verify`: steps of the Megatron family, whose layouts are told."""
    family = rows("Korthikanti") + rows("Megatron-2021 GPT 1")
    checks = list(verify.checks(family + rows("Megatron-2021 Table2 PTD-P gpt3", "hw")))
    assert median(check.error for check in checks if check.kind == "step, dense") < 0.06
    assert any("goal 6% / 20%" in line and "skill" in line for line in verify.summary(checks))


@pytest.mark.parametrize(("kind", "middle", "most"), [
    ("step, dense", 0.06, 0.20), ("step, mixture", 0.08, 0.25), ("peak memory", 0.06, 0.20),
    ("memory by formula", 0.06, 0.20), ("V3's phases", 0.20, 0.22),
])  # fmt: skip
def test_the_whole_table_stays_as_good_as_it_was(table, kind, middle, most):
    """What docs/explanation/planning.md says that `limbeck plan verify` prints: a change that spoils it is
    noticed."""
    errors = [check.error for check in table if check.kind == kind]
    assert len(errors) > 5 and median(errors) < middle and verify.percentile(errors, 0.95) < most


def test_what_cannot_be_foreseen_says_why():
    row = replace(rows("LLaMA-1 7B")[0], columns={**rows("LLaMA-1 7B")[0].columns, "chip": "abacus"})
    (check,) = verify.checks([row])
    assert check.kind == "not foreseen" and "chip 'abacus' is not known" in check.tell()


def test_a_table_that_is_none(tmp_path):
    with pytest.raises(LimbeckError, match="name a table of runs"):
        read(tmp_path / "none.csv")
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LimbeckError, match="has no column"):
        read(tmp_path / "odd.csv")
