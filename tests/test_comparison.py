"""Ways of pretraining against their compute: where a curve is read, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from limbeck.report import comparison, report, summary
from limbeck.report.loaded_run import Run, StageView


def stage(folder: Path, name: str, losses: np.ndarray, flops: float) -> StageView:
    """A finished pretraining with these losses, logged at every second step."""
    (folder / name).mkdir()
    rows = [{"step": 2 * i, "loss": float(loss)} for i, loss in enumerate(losses)]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return StageView(name, "pretrain", "", folder / name, {"flops": flops, "notes": {"parameters": 1000}}, ())


def run(folder: Path, scale: float, flops: float = 1e12) -> Run:
    """Two seeds each of `dense`, which falls from 2 to 1, and of `moe`, `scale` times as fast."""
    done = np.linspace(0, 1, 400)
    stages = [stage(folder, f"dense_{i}", 2 - done + 0.001 * i, flops) for i in range(2)]
    stages += [
        stage(folder, f"moe_{i}", np.maximum(2 - scale * done, 0.5) + 0.001 * i, flops) for i in range(2)
    ]
    names = {kind: [s.name for s in stages if s.name.startswith(kind)] for kind in ("dense", "moe")}
    recipe = {
        "name": "two ways",
        "description": "",
        "stages": {"report": {"kind": "report", "evaluation": "none", "compare": names}},
    }
    return Run(tuple(stages), recipe, {})


def test_a_way_that_falls_twice_as_fast_needs_half_the_compute(tmp_path):
    told = comparison.compare(run(tmp_path, scale=2))
    dense, moe = told["ways"]["dense"], told["ways"]["moe"]
    assert told["target"] == pytest.approx(
        1.0255, abs=0.002
    )  # the mean over the last twentieth, and over seeds
    assert len(dense["final_losses"]) == 2 and dense["reaches_target_after"] == dense["flops"] == 1e12
    assert moe["reaches_target_after"] / dense["flops"] == pytest.approx(0.51, abs=0.02)
    (said,) = summary.comparison(told)
    assert "moe reaches dense's final loss" in said.en and "moe 用" in said.zh and "dense" in said.zh


def test_a_way_that_never_gets_there_is_said_plainly(tmp_path):
    told = comparison.compare(run(tmp_path, scale=0.5))
    assert told["ways"]["moe"]["reaches_target_after"] is None
    (said,) = summary.comparison(told)
    assert "moe does not reach dense's final loss" in said.en and "未达到" in said.zh


def test_nothing_is_compared_where_nothing_was_asked(tmp_path):
    alone = run(tmp_path, scale=2)
    assert comparison.compare(Run(alone.stages, {"stages": {}}, {})) is None


def test_the_page_draws_the_curves_and_says_where_they_meet(tmp_path):
    done = run(tmp_path, scale=2)
    page = report.write(tmp_path / "report", done.stages, done.recipe, {"seconds": 1.0}).read_text()
    target = comparison.compare(done)["target"]
    assert f"moe reaches dense&#39;s final loss ({target:.4f})" in page
