"""`limbeck compare`: two models or two runs on the same problems."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import tiny

from limbeck.eval.statistics import paired_difference
from limbeck.report.paired import compare

pytestmark = pytest.mark.slow


def rows(*right: list[float]) -> dict:
    """Verdicts on problems p0, p1, ... of one source at temperature 1."""
    problems = {
        f"p{i}": {"problem": f"p{i}", "prompt": f"ask {i}", "right": values, "text": f"answer {values}"}
        for i, values in enumerate(right)
    }
    return {("clock", "t1"): problems}


def test_the_interval_is_that_of_paired_differences():
    """Differences that what both have in common does not widen; and no width of zero."""
    random = np.random.default_rng(0)
    hard = random.random(400)
    pairs = [(h, min(1.0, h + 0.05 * random.random())) for h in hard]
    gap, low, high = paired_difference(pairs)
    differences = np.array([b - a for a, b in pairs])
    error = 1.959964 * differences.std(ddof=1) / math.sqrt(400)
    assert (gap, low, high) == pytest.approx((differences.mean(), gap - error, gap + error))
    assert 0 < low < high < 0.05
    same, below, above = paired_difference([(1.0, 1.0)] * 10)
    assert same == 0 and below < 0 < above


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Simulated: B solves a few problems more than A; 95 % of the intervals hold the difference."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        chance = random.random(150)
        a = random.random(150) < chance
        b = random.random(150) < np.minimum(1, chance + 0.1)
        truth = (np.minimum(1, chance + 0.1) - chance).mean()
        _, low, high = paired_difference(list(zip(a.astype(float), b.astype(float), strict=True)))
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.985


def test_problems_that_only_one_was_asked_do_not_count():
    before = rows([1.0], [0.0], [0.0, 1.0], [1.0])
    after = rows([1.0], [1.0], [0.0, 1.0])
    (result,) = compare(before, after)
    assert result.a.problems == result.b.problems == 3
    assert result.difference == pytest.approx(1 / 3)
    assert [flip.problem for flip in result.flips.won] == ["p1"]
    assert (len(result.flips.lost), result.flips.held, result.flips.missed) == (0, 1, 1)
    assert compare(before, {("other", "t1"): {}}) == []


@pytest.fixture(scope="module")
def home(finished, tmp_path_factory):
    """Two runs beside the tiny one, which evaluate two models; the second learns for longer."""
    home = tmp_path_factory.mktemp("compared") / "runs"
    shutil.copytree(finished.home, home)
    for name, more in (("short", ()), ("long", ("--set", "stages.zero.steps=10"))):
        models = "stages.evaluation.models=[base, zero]"
        code, _, err = tiny.answer(
            "run", finished.recipe, "--runs", home, "--set", f"name={name}", "--set", models, *more
        )
        assert code == 0, err
    return home


def test_two_models_of_a_run(home, call, tmp_path):
    """Table, JSON and page agree; the costs of zero include those of base."""
    text = call("compare", "short/base", "short/zero", "--runs", home, "--page", tmp_path / "page.html")
    assert text.code == 0
    assert "B - A, points" in text.out
    told = json.loads(call("compare", "short/base", "short/zero", "--runs", home, "--json").out)["data"]
    (results,) = told["results"].values()
    first = results[0]
    assert first["difference"] == pytest.approx(first["b"]["mean"] - first["a"]["mean"])
    assert first["low"] <= first["difference"] <= first["high"]
    asked = len(first["won"]) + len(first["lost"]) + first["right_in_both"] + first["wrong_in_both"]
    assert asked == first["a"]["problems"] > 0
    assert f"{asked} problems" in text.out
    assert told["b"]["costs"]["flops"] > told["a"]["costs"]["flops"] > 0
    page = (tmp_path / "page.html").read_text()
    assert f"{100 * first['difference']:+.1f}" in page and "<svg" in page


def test_two_runs_model_by_model(home, call, tmp_path):
    """Curves of stages of one name, the setting that differs, and a base that is the same."""
    page = tmp_path / "page.html"
    told = json.loads(call("compare", "short", "long", "--runs", home, "--json", "--page", page).out)["data"]
    assert set(told["results"]) == {"base", "zero"}
    assert all(result["difference"] == 0 for result in told["results"]["base"])
    assert told["settings"]["long"]["stages.zero.steps"] == "10"
    assert "stages.zero.steps" in page.read_text() and "zero · accuracy" in page.read_text()


@pytest.mark.parametrize(
    "names, says",
    [
        (("short/zero", "short/zero"), "name two different models"),
        (("short/zero", "short/dev1"), "short/dev1 was not evaluated by any run here"),
        (("short/zero", "nothing"), "nothing"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(home, call, names, says):
    ended = call("compare", *names, "--runs", home)
    assert ended.code == 2
    assert says in ended.err and "Traceback" not in ended.err


def test_two_models_are_asked_now(home, finished, call):
    """Twice the same command: the second one finds both evaluations."""
    command = (
        "compare", "long/zero", "short/zero", "--problems", finished.recipe, "--mode", "greedy",
        "--prompts", "8", "--runs", home, "--json",
    )  # fmt: skip
    first = call(*command)
    assert first.code == 0, first.err
    (results,) = json.loads(first.out)["data"]["results"].values()
    assert (results[0]["mode"], results[0]["a"]["problems"]) == ("greedy", 8)
    stored = tiny.digests(home)
    assert call(*command).out == first.out and tiny.digests(home) == stored
