"""The bake-off's recipe, with everything in it made small: it runs, and its students are equals."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from limbeck.run_log import read_metrics

pytestmark = pytest.mark.slow

SMALL = [
    "problems.clock.numbers=2",
    "problems.clock.modulus=3",
    "stages.base.tokens=30000",
    "stages.small_base.tokens=6000",
    "stages.zero.steps=2",
    "stages.alone.steps_without_signal=0",
    "stages.zero.policy.prompts_per_step=4",
    "stages.alone.policy.prompts_per_step=4",
    *(
        f"stages.{stage}.{setting}"
        for stage in ("outputs", "brief", "pairs", "best")
        for setting in ("prompts=24", "samples=2")
    ),
    *(
        f"stages.{stage}.sampling.max_new_tokens=24"
        for stage in ("zero", "alone", "outputs", "brief", "pairs", "best", "gkd", "on_policy")
    ),
    *(
        f"stages.{stage}.{setting}=false"
        for stage in ("outputs", "brief")
        for setting in ("correct", "wellformed")
    ),
    *(
        f"stages.{stage}.flops=1.5e+9"
        for stage in (
            "full",
            "answers",
            "short",
            "chosen",
            "dpo",
            "dpo_mean",
            "logits",
            "gkd",
            "on_policy",
            "alone",
        )
    ),
    "stages.evaluation.prompts=8",
    "stages.evaluation.max_new_tokens=24",
]


def test_the_bake_off_runs_and_no_student_spends_more_than_the_others(tmp_path):
    recipe = Path(__file__).parent.parent / "limbeck" / "recipes" / "bakeoff.yaml"
    run = tiny.open_run(recipe, tmp_path, *SMALL)
    assert run.execute().name == "index.html"
    for node in run.graph.nodes.values():
        if node.kind in ("pretrain", "rl", "sft", "dpo", "distill"):
            assert "weights_changed" in node.artifact.manifest["notes"], node.name
    budgeted = {name: node for name, node in run.graph.nodes.items() if getattr(node.stage, "flops", None)}
    assert len(budgeted) == 10
    for name, node in budgeted.items():
        manifest, steps = node.artifact.manifest, read_metrics(node.artifact.folder)
        spent = manifest["flops"] + manifest["notes"].get("data_flops", 0)
        last = max(
            (row.get("flops", 0) for row in steps), default=0
        )  # what stops after a step may pass the budget by it
        assert 0 < spent <= 1.02 * 1.5e9 + last, name
