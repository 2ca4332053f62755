"""`limbeck results`: what the evaluations of made-up runs measured, as a table, and pooled over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RECIPE = """
name: {name}
seed: {seed}
problems: {{clock: {{source: miniature}}, chat: {{source: miniature, task: repeat}}}}
stages:
  base: {{kind: load, path: model}}
  zero: {{kind: rl, model: base, problems: {{clock: 1}}, steps: {steps}}}
  evaluation: {{kind: evaluate, models: [base, zero], problems: [clock, chat], modes: [t1, greedy]}}
"""


def interval(mean: float, width: float, n: int) -> dict:
    """A mean with its interval."""
    return {"mean": mean, "low": mean - width, "high": mean + width, "n": n, "problems": n}


def mode(accuracy: float, **more) -> dict:
    """What was measured in one way of sampling."""
    return {
        "accuracy": interval(accuracy, 0.02, 100),
        "length": 41.25,
        "thought_length": 30.5,
        "truncated": 0.01,
        "language_consistency": None,
        "intervals": {
            "length": interval(41.25, 2, 100),
            "thought_length": interval(30.5, 1, 100),
            "truncated": interval(0.01, 0.01, 100),
        },
        "stats": {"attempts": 5.5},
        **more,
    }


def make_run(home: Path, seed: int, zero: float, steps: int = 10, **more) -> str:
    """The name of a run whose two models were evaluated; `zero` is the accuracy of the second at T = 1."""
    name = f"mine-{seed}-{steps}"
    (home / name).mkdir(parents=True)
    (home / name / "recipe.yaml").write_text(RECIPE.format(name=name, seed=seed, steps=steps))
    index = {}
    for model, accuracy in (("base", 0.25), ("zero", zero)):
        sampled = {"t1": mode(accuracy, **more), "greedy": mode(accuracy)}
        sources = {source: {"modes": sampled} for source in ("clock", "chat")}
        folder = home / "store" / f"evaluate-{name}-{model}"
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(
            json.dumps({"schema": 1, "model": model, "control": None, "sources": sources})
        )
        (folder / "manifest.json").write_text(json.dumps({"kind": "evaluate"}))
        index[f"evaluation/{model}"] = folder.name
    (home / name / "stages.json").write_text(json.dumps(index))
    return name


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "runs"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_markdown_table_has_every_measure_with_its_interval(home, call):
    name = make_run(home, 0, 0.5, **{"pass@8": interval(0.75, 0.1, 100)})
    head, rule, *rows = call("results", name, "--runs", home, "--markdown").out.splitlines()
    assert cells(head) == [
        "problems", "model", "T = 1", "greedy", "pass@8", "tokens", "tokens of the thought", "cut off",
    ]  # fmt: skip
    assert rule == "|" + "---|" * 8
    assert [cells(row)[:2] for row in rows] == [
        ["clock", "base"], ["clock", "zero"], ["chat", "base"], ["chat", "zero"],
    ]  # fmt: skip
    assert cells(rows[1])[2:] == [
        "50.0% (48.0% to 52.0%, n = 100)",
        "50.0% (48.0% to 52.0%, n = 100)",
        "75.0% (65.0% to 85.0%, n = 100, T = 1)",
        "41.2 (39.2 to 43.2, n = 100)",
        "30.5 (29.5 to 31.5, n = 100)",
        "1.0% (0.0% to 2.0%, n = 100)",
    ]


def test_an_evaluation_of_an_earlier_version_has_means_without_intervals(home, call):
    name = make_run(home, 0, 0.5, intervals={}, thought_length=None)
    text = call("results", name, "--runs", home, "--stat", "attempts").out
    assert "tokens                 41.2\n" in text and "tokens of the thought" not in text
    assert "attempts               5.50\n" in text


def test_seeds_are_pooled(home, call):
    """0.5, 0.6 and 0.7: mean 0.6, standard deviation 0.1."""
    names = [make_run(home, seed, 0.5 + 0.1 * seed) for seed in range(3)]
    head, _, *rows = call("results", *names, "--runs", home, "--markdown").out.splitlines()
    assert cells(head)[:4] == ["problems", "model", "run", "seed"] and len(rows) == 12
    head, _, *rows = call("results", *names, "--runs", home, "--markdown", "--pool").out.splitlines()
    assert cells(head)[:3] == ["problems", "model", "T = 1"] and len(rows) == 4
    assert cells(rows[1])[2] == "60.0% ± 10.0 (50.0% to 70.0%, 3 seeds)"
    told = json.loads(call("results", *names, "--runs", home, "--pool", "--json").out)["data"]
    measure = told[1]["measures"]["t1"]
    assert (measure["mean"], measure["deviation"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert (measure["seeds"], measure["n"], told[1]["run"]) == (3, 100, "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("nothing",), "nothing is no run"),
        (("mine-0-10", "--pool"), "--pool needs several runs"),
        (("mine-0-10", "mine-0-20", "--pool"), "both have the seed 0"),
        (("mine-0-10", "mine-1-20", "--pool"), "differ in stages.zero.steps"),
        (("mine-0-10", "--stat", "luck"), "no evaluation has it; they have attempts"),
        (("begun",), "begun has no finished evaluation"),
    ],
)
def test_what_cannot_be_told_is_one_sentence(home, call, options, says):
    for seed, steps in ((0, 10), (0, 20), (1, 20)):
        make_run(home, seed, 0.5, steps)
    (home / "begun").mkdir()
    (home / "begun" / "recipe.yaml").write_text(RECIPE.format(name="begun", seed=0, steps=1))
    ended = call("results", *options, "--runs", home)
    assert ended.code == 2 and ended.out == ""
    assert says in ended.err and "Traceback" not in ended.err


def test_a_matrix_has_a_column_for_each_model(home, call):
    name = make_run(home, 0, 0.5)
    lines = call("results", name, "--runs", home, "--matrix", "t1", "--matrix", "attempts").out.splitlines()
    heads = ["T = 1", "---|---|---", "clock", "chat", "attempts", "---|---|---", "clock", "chat"]
    assert [cells(line)[0] for line in lines if line] == heads
    assert cells(lines[0])[1:] == ["base", "zero"]
    assert [text[:5] for text in cells(lines[2])[1:]] == ["25.0%", "50.0%"]
    assert cells(lines[-1])[1:] == ["5.50", "5.50"]
    refused = call("results", name, "--runs", home, "--matrix", "nothing")
    assert refused.code == 2 and "--matrix nothing: no evaluation has it" in refused.err
