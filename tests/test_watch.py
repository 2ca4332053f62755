"""What is told of a run from outside: its record as it grows, flips, sentences, and the overview of its
folder."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import limbeck
from limbeck.activity import ActivityReport, phase
from limbeck.pipeline import run_state, run_status, run_view
from limbeck.pipeline.run_folder import add_interval, clock_seconds
from limbeck.report import flips, sentences
from limbeck.report.graph_drawing import Box, draw
from limbeck.report.history import History
from limbeck.report.i18n import Text
from limbeck.run_log import METRICS, ROLLOUTS, RunLog, read
from limbeck.types import Completion, Group, Problem, Score


def group(problem: str, *right: bool) -> Group:
    """A group of which some are right."""
    made = tuple(
        Completion(np.array([1, 2]), np.array([-0.1, -0.1]), f"text {i}", True, i) for i in range(len(right))
    )
    scores = tuple(
        Score({"accuracy": float(one)}, {} if one else {"accuracy": "answer 3, gold 4"}) for one in right
    )
    return Group(
        Problem(problem, f"{problem}?"), np.array([5]), made, scores, tuple(float(one) for one in right)
    )


def test_a_history_reads_on_where_it_stopped_and_begins_anew_when_its_stage_does(tmp_path):
    record = RunLog(tmp_path, 0, 20)
    history = History(tmp_path)
    assert history.look().done == 0
    assert history.pace is None
    for step in range(10):
        record.step(
            step,
            {"reward": step / 10, "gap": 1e-6},
            [group("a", step > 5, step > 5)] if step % 4 == 0 else [],
        )
    seen = history.look().version
    assert (history.done, history.total, history.steps) == (10, 20, list(range(10)))
    assert [(one.step, one.right) for one in history.shown] == [(0, 0.0), (4, 0.0), (8, 1.0)]
    assert history.responses(4) == [
        {k: v for k, v in row.items() if k != "step"} | {"step": 4}
        for row in read(tmp_path / ROLLOUTS)
        if row["step"] == 4
    ]
    assert history.look().version == seen

    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 10, "rew')
    assert history.look().done == 10
    assert history.version == seen
    RunLog(tmp_path, 6, 20).step(6, {"reward": None, "held_out_accuracy": 0.5, "alarms": ["too long"]})
    history.look()
    assert history.steps == list(range(7))
    assert [one.step for one in history.shown] == [0, 4]
    assert math.isnan(history.columns["reward"][6])
    assert history.column("held_out_accuracy").tolist() == [0.5]
    assert all(len(column) == 7 for column in history.columns.values())
    assert history.alarms == [(6, "too long")]


def test_a_look_reads_only_what_is_new(tmp_path, monkeypatch):
    record = RunLog(tmp_path, 0)
    history = History(tmp_path)
    for step in range(50):
        record.step(step, {"reward": 1.0})
    history.look()
    parsed = []
    monkeypatch.setattr(
        "limbeck.report.history.json.loads",
        lambda line: parsed.append(line) or json.JSONDecoder().decode(line.decode()),
    )
    history.look()
    assert parsed == []
    record.step(50, {"reward": 2.0})
    history.look()
    assert len(parsed) == 2
    assert history.columns["reward"][-1] == 2.0  # its metrics and its timing


def test_curves_of_thousands_of_steps_are_means_of_neighbours(tmp_path):
    rows = (
        {"step": step, "reward": float(step % 2), **({"rare": 3.0} if step == 1000 else {})}
        for step in range(5000)
    )
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = History(tmp_path).look().curves(400)
    assert len(told["steps"]) == 400
    assert max(map(len, told["columns"].values())) == 400
    assert told["columns"]["reward"] == pytest.approx([0.5] * 400, abs=0.05)
    assert [value for value in told["columns"]["rare"] if value is not None] == [3.0]
    assert told["steps"] == sorted(told["steps"])
    assert 0 <= told["steps"][0] < 13
    assert told["steps"][-1] > 4985
    json.dumps(told, allow_nan=False)


def test_flips_between_two_evaluations_and_between_steps(tmp_path):
    for name, right in (("before", "01101"), ("after", "11010")):
        rows = [
            {"problem": str(i), "prompt": f"{i}?", "mode": "t1", "text": name, "correct": one == "1"}
            for i, one in enumerate(right)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = flips.between(tmp_path / "before", tmp_path / "after")
    assert ([f.problem for f in found.won], [f.problem for f in found.lost]) == (["0", "3"], ["2", "4"])
    assert (found.held, found.missed, found.asked) == (1, 0, 5)

    record = RunLog(tmp_path, 0)
    for step, groups in enumerate(
        [
            [group("a", False, False), group("b", True, True)],
            [group("c", True, True)],
            [group("a", True, True), group("b", True, False)],
        ]
    ):
        record.step(step, {}, groups)
    within = flips.within(History(tmp_path).look().shown)
    assert [f.problem for f in within.won] == ["a"]
    assert [f.problem for f in within.lost] == ["b"]
    assert within.asked == 2


def test_sentences_turn_where_the_numbers_turn(tmp_path):
    wave = [0.5 + 0.2 * math.sin(2.4 * step) for step in range(60)]
    for name, rewards in (
        ("up", [step / 60 for step in range(60)]),
        ("down", [1 - step / 60 for step in range(60)]),
        ("wave", wave),
    ):
        (tmp_path / name).mkdir()
        record = RunLog(tmp_path / name, 0, 100)
        for step, reward in enumerate(rewards):
            record.step(
                step,
                {
                    "accuracy": reward,
                    "gap": 1e-6,
                    "informative": 0.4,
                    "truncated": 0.2 if name == "up" else 0.0,
                    **({"alarms": ["x: too long"]} if step > 57 else {}),
                },
            )
    told = {
        name: sentences.curves("rl", History(tmp_path / name).look())[0] for name in ("up", "down", "wave")
    }
    assert told["up"] == Text("Accuracy rose from 4.2% to 94.2%.", "准确率从 4.2% 升到 94.2%。")
    assert told["down"].en == "Accuracy fell from 95.8% to 5.8%."
    assert "降" in told["down"].zh
    valley = sentences._went(Text("A", "甲"), np.array([0.5, *np.linspace(0.9, 0.1, 17), 0.6]), str)
    assert "no clear direction" in valley.en  # it ends higher than it began, but did not rise
    assert "no clear direction" in told["wave"].en
    assert "没有明显的方向" in told["wave"].zh
    sound = [text.en for text in sentences.soundness(History(tmp_path / "up").look())]
    assert "differ by at most 1.0e-06 nats a token: no more than rounding." in sound[0]
    assert sound[1:] == [
        "Of the latest groups 40% hold both better and worse responses; the others teach nothing.",
        "20% of the latest responses ran out of tokens.",
        "Alarm at step 58 (2 in all): x: too long.",
    ]
    running = sentences.progress("zero", "rl", "running", History(tmp_path / "up").look(), {})
    assert running.en.startswith("zero has taken 60 of 100 steps; one takes")
    assert running.zh.startswith("zero 已走 60/100 步")
    assert (
        sentences.progress("zero", "rl", "begun", History(tmp_path / "up").look(), {}).en
        == "zero has taken 60 of 100 steps and rests."
    )


@pytest.mark.parametrize(
    "actual, over, said",
    [
        (50, True, "shorter"),
        (100, True, "as foreseen"),
        (200, True, "longer"),
        (50, False, "have passed."),
        (200, False, "more than"),
    ],
)
def test_a_plan_is_compared_with_what_came(actual, over, said):
    assert said in sentences.foreseen(actual, {"seconds": 100, "low": 80, "high": 130}, over).en


def test_a_finished_run_is_told_from_its_folder_alone(finished):
    run = run_state.look(finished.home / "tiny")
    assert run.complete
    assert run_state.list_runs(finished.home) == [finished.home / "tiny"]
    assert run_status.status(run.folder).state == "finished"
    assert not run_status.is_running(run.folder)
    lines = run_view.lines(run, alive=False)
    assert [line.state for line in lines] == ["done"] * len(lines)
    assert lines[0].name == "brought"
    zero = next(line for line in lines if line.name == "zero")
    assert zero.share == 1
    assert zero.history.done == 8
    assert zero.rewards() == ["accuracy", "format", "language"]
    told = [text.en for text in run_view.narrate(run, lines)]
    assert told[0] == f"{len(lines)} of {len(lines)} stages are done."
    assert zero.said[0].en.startswith("zero is done: RL in")
    assert zero.said[0].zh.startswith("zero 已完成")
    evaluation = next(line for line in lines if line.kind == "evaluate")
    assert any("On clock, temperature 1" in text.en for text in evaluation.said)
    assert run_view.samples(evaluation)
    drawn = run_view.draw(lines, "the stages", lambda name: f"/runs/tiny/{name}")
    assert 'href="/runs/tiny/zero"' in drawn
    assert "evaluation" not in drawn
    assert "style=" not in drawn
    assert run_view.responses(zero, None)["step"] == 7
    assert run_view.responses(zero, 3)["before"] == 2


def test_a_forecast_stands_beside_what_was_measured(finished):
    run = run_state.look(finished.home / "tiny")
    path = run.folder / run_state.FORECAST
    path.write_text(
        json.dumps({"stages": {name: {"seconds": 5.0, "low": 0.0, "high": 1e6} for name in ("base", "zero")}})
    )
    try:
        run = run_state.look(run.folder)
        lines = run_view.lines(run, alive=False)
        assert [line.name for line in lines if line.foreseen] == ["base", "zero"]
        assert "The plan said 10 s" in run_view.narrate(run, lines)[-1].en
    finally:
        path.unlink()


def test_the_clock_counts_stages_that_ran_side_by_side_once_and_reused_ones_not_at_all(tmp_path):
    assert clock_seconds(tmp_path, ["rl-1"]) == 0
    for artifact, begin, end in (
        ("rl-1", 100.0, 130.0),
        ("rl-1", 500.0, 510.0),
        ("sft-2", 120.0, 140.0),
        ("sft-3", 125.0, 126.0),
        ("other", 900.0, 999.0),
    ):
        add_interval(tmp_path, artifact, begin, end)
    assert clock_seconds(tmp_path, ["rl-1", "sft-2", "sft-3"]) == 50
    assert clock_seconds(tmp_path, ["sft-2", "load-9"]) == 20


def test_a_forecast_is_compared_with_the_clock_and_not_with_the_sum_of_the_stages(tmp_path, finished):
    """Three stages: two beside each other on two workers, one that was there already."""
    run = run_state.look(finished.home / "tiny")
    stages = {stage.name: stage for stage in run.stages}
    for name, begin, end in (("base", 0, 100), ("zero", 100, 200), ("screened", 110, 190)):
        add_interval(tmp_path, stages[name].folder.name, 1e9 + begin, 1e9 + end)
    times = {"seconds": 90.0, "low": 50.0, "high": 120.0}
    foreseen = dict.fromkeys(("base", "zero", "screened", "traces"), times)
    recipe = run.recipe.model_copy(update={"workers": 2})
    compared = run_view.against_clock(replace(run, folder=tmp_path, recipe=recipe, foreseen=foreseen))
    assert compared == {"took": 200.0, "seconds": 180.0, "low": 100.0, "high": 240.0}
    alone = replace(run, folder=tmp_path, foreseen={"base": times})
    assert run_view.against_clock(alone) is None


def test_a_run_that_is_going_on_shows_what_was_begun(tmp_path, finished):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "recipe.yaml").write_bytes((finished.home / "tiny" / "recipe.yaml").read_bytes())
    partial = tmp_path / "store" / ".partial" / "rl-1"
    partial.mkdir(parents=True)
    RunLog(partial, 0, 4).step(0, {"reward": 0.5})
    with run_status.RunStatus(folder) as told:
        told.begun["zero"] = "rl-1"
        told.tell("running")
        assert run_status.is_running(folder)
        zero = run_view.line_of(run_state.look(folder), run_state.look(folder).stage("zero"), alive=True)
        assert (zero.state, zero.share) == ("running", 0.25)
        assert '<g class="running">' in run_view.draw([zero], "x", str)
        assert "1/4" in run_view.draw([zero], "x", str)
        with (
            ActivityReport(partial) as report,
            phase("sampling", "problems", 8),
            phase("", "rows", 32) as rows,
        ):
            rows.advance(5)
            rows.began -= 10
            rows.add_tokens(1000)
            report.write()
            zero = run_view.line_of(run_state.look(folder), run_state.look(folder).stage("zero"), alive=True)
            text = zero.said[1]
        assert text.en.startswith("Now: sampling 0 of 8 problems, 5 of 32 rows; 100 tokens a second; ")
        assert text.zh.startswith("现在：采样 0/8 题，5/32 行；每秒 100 词元；")
    assert not run_status.is_running(folder)
    assert run_status.status(folder).state == "finished"


def test_every_phase_that_the_code_names_has_its_words_in_chinese():
    opened = r"""\bphase\("([^"]*)"(?:, "([^"]*)")?"""
    tracked = r"""\btrack\(.*, "([^"]*)", "([^"]*)"\)"""
    phases, units = set(), set()
    for path in Path(limbeck.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name, unit in re.findall(opened, text) + re.findall(tracked, text):
            phases.add(name)
            units.add(unit)
    assert len(phases) > 12 and phases <= set(sentences.PHASES)
    assert units - {""} == set(sentences.PHASE_UNITS)


def test_a_drawing_escapes_what_it_is_given():
    drawn = draw([Box("<b>", Text('"x"', "<i>"), (), "model", '/a"b', "running", 0.5)], 'la"bel')
    assert "<b>" not in drawn
    assert "<i>" not in drawn
    assert 'href="/a&#34;b"' in drawn
    assert "la&#34;bel" in drawn


def test_expert_loads_are_kept_as_they_are_last(tmp_path: Path):
    record = RunLog(tmp_path, 0)
    history = History(tmp_path)
    record.step(0, {"loss": 1.0, "expert_loads": [[0.5, 0.5]]})
    record.step(1, {"loss": 0.9, "expert_loads": [[0.25, 0.75]]})
    assert history.look().loads == [[0.25, 0.75]]
    assert set(history.columns) == {"loss"}


def test_every_alarm_is_told_in_chinese():
    """Those that a watch rings by itself, and both of an opinion that was hacked."""
    from limbeck.config.recipe import RL
    from limbeck.report.sentences import alarm
    from limbeck.train.alarms import AlarmMonitor

    watch = AlarmMonitor(RL(kind="rl", model="m", problems={"p": 1}, rewards={"accuracy": 1, "format": 1}))
    watch.history.extend({"length": 10.0} for _ in range(19))
    bad = {"truncated": 0.6, "informative": 0.05, "length": 40.0, "format": 1.0, "accuracy": 0.0}
    watch.without_signal = None  # a step before this one had a learning signal
    rung = watch.check(bad, [group("p/1", True, False)])
    rung += [
        f"reward hacking: judge rises while the truth on held-out problems does not: {then}"
        for then in ("the stage ends here", "it no longer counts")
    ]
    assert len(rung) == 6
    for text in [*rung, "length fell to a third within 20 steps"]:
        said = alarm(text)
        assert said.en == text
        assert not re.search(r"[a-z]{3} [a-z]{3}", said.zh)
        assert re.search(r"[\u4e00-\u9fff]", said.zh)
    assert alarm("unheard of").zh == "unheard of"
