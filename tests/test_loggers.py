"""Metrics for other tools: what is written is what the stages have logged, once, whatever was killed."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_python_api import MINE

import limbeck
from limbeck import LimbeckError, Run
from limbeck.pipeline.loggers.stream import scalars
from limbeck.pipeline.run import Quiet
from limbeck.run_log import METRICS


def expected(run: Run) -> dict[str, list[tuple[int, float]]]:
    """`STAGE/METRIC` -> steps and values, from the stages' own logs."""
    series = {}
    for row in run.metrics:
        for name, value in scalars({key: row[key] for key in row if key not in ("stage", "step")}).items():
            series.setdefault(f"{row['stage']}/{name}", []).append((row["step"], value))
    return series


def from_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same, read back from TensorBoard's event files."""
    series = {}
    for place in sorted({path.parent for path in folder.rglob("events.*")}):
        events = EventAccumulator(str(place), size_guidance={"tensors": 0, "scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            points = [(event.step, event.value) for event in events.Scalars(tag)]
            series[f"{place.relative_to(folder)}/{tag}"] = points
    return series


def from_lines(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The same, read back from the file of JSON lines."""
    series = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        stage, step = row.pop("stage"), row.pop("step")
        for name, value in row.items():
            series.setdefault(f"{stage}/{name}", []).append((step, value))
    return series


def approximately(series):
    """The same series, to be equal up to the rounding of TensorBoard's 32-bit numbers."""
    rounded = {}
    for name, points in series.items():
        rounded[name] = [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
    return rounded


@pytest.mark.slow
def test_a_finished_run_is_written_with_the_names_of_its_report(finished, tmp_path):
    shutil.copytree(finished.home, tmp_path / "runs")
    options = ("--runs", tmp_path / "runs", "--log", "tensorboard", "--log", "jsonl")
    for _ in range(2):  # the second time it is written anew, not twice
        code, _, said = tiny.answer("run", finished.recipe, *options)
        assert code == 0, said
    run = Run(tmp_path / "runs" / "tiny")
    series = expected(run)
    assert {"zero/reward", "zero/accuracy", "dev1/loss", "evaluation/zero/accuracy/clock/t1"} <= set(series)
    assert from_lines(run.folder / METRICS) == series
    assert from_events(run.folder / "tensorboard") == approximately(series)


@pytest.mark.slow
def test_a_killed_run_gives_the_series_of_one_that_was_not(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(MINE))
    options = ("--runs", tmp_path / "killed", "--log", "tensorboard", "--log", "jsonl")
    settings = ("--set", "stages.base.tokens=80000", "--set", "stages.base.save_every=0.1")
    program = tiny.limbeck("run", recipe, *options, *settings)
    lines = tmp_path / "killed" / "mine" / METRICS
    tiny.until(lambda: lines.exists() and lines.read_text().count("\n") > 20)
    program.send_signal(signal.SIGKILL)
    program.communicate(timeout=200)
    assert not Run(tmp_path / "killed" / "mine").artifacts
    code, _, said = tiny.answer("run", recipe, *options, *settings)
    assert code == 0, said
    changed = {"stages.base.tokens": 80_000, "stages.base.save_every": 0.1}
    whole = limbeck.run(MINE, runs=tmp_path / "whole", display=Quiet(), log="jsonl", **changed)
    assert lines.read_text() == (whole.folder / METRICS).read_text()
    assert from_events(lines.parent / "tensorboard") == approximately(expected(whole))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandb", "--log wandb: the package wandb is not installed; `pip install 'limbeck[wandb]'`"),
        ("csv", "--log csv: there is no such logger; choose one of jsonl, tensorboard, wandb"),
    ],
)
def test_what_cannot_be_written_is_one_sentence_before_anything_runs(tmp_path, name, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LimbeckError) as error:
        limbeck.run(MINE, runs=tmp_path, log=name, display=Quiet())
    assert str(error.value) == said and error.value.exit_code == 2
    assert not list(tmp_path.glob("*/*"))


def test_the_command_line_says_so_too(tmp_path):
    code, out, said = tiny.answer("run", "smoke", "--runs", tmp_path, "--log", "csv")
    assert (code, out, said.count("\n")) == (2, "", 1) and "choose one of jsonl, tensorboard" in said
    assert not list(tmp_path.iterdir())


class Service:
    """What Weights & Biases keeps of each run, by the run's id, and how it was opened."""

    def __init__(self):
        self.rows: dict[str, list[dict]] = {}
        self.opened: list[dict] = []

    def init(self, **options):
        self.opened.append(options)
        if options["mode"] == "offline":
            self.rows[options["id"]] = []
            (Path(options["dir"]) / "wandb").mkdir()
        return Opened(self.rows.setdefault(options["id"], []))


class Opened:
    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.summary = {name: value for row in rows for name, value in row.items()}
        self.axes = {}

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row):
        assert any(axis in row for axis in self.axes.values())
        self.rows.append(row)

    def finish(self): ...


@pytest.fixture
def service(monkeypatch) -> Service:
    """A module `wandb` with the part of its interface that we use."""
    stub, service = ModuleType("wandb"), Service()
    stub.init, stub.Error = service.init, type("Error", (Exception,), {})
    stub.__spec__ = json.__spec__
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return service


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_is_offline_by_default_and_has_no_step_twice(service, tmp_path, monkeypatch, mode):
    if mode == "online":
        monkeypatch.setenv("WANDB_MODE", mode)
    for _ in range(2):
        run = limbeck.run(MINE, runs=tmp_path, log="wandb", display=Quiet())
    first, second = service.opened
    assert first["mode"] == mode and first["id"] == second["id"] and first["project"] == "limbeck"
    assert first["dir"] == str(run.folder) and first["config"]["stages"]["base"]["tokens"] == 3000
    (rows,) = service.rows.values()
    assert [row["base/step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["base/loss"] for row in rows] == [row["loss"] for row in run.metrics]


def test_wandb_without_a_key_is_one_sentence(service, tmp_path):
    def refuse(**options):
        raise sys.modules["wandb"].Error("no API key")

    sys.modules["wandb"].init = refuse
    with pytest.raises(LimbeckError, match="--log wandb: no API key; WANDB_MODE=offline writes locally"):
        limbeck.run(MINE, runs=tmp_path, log="wandb", display=Quiet())


def test_only_finite_numbers_are_written():
    row = {"reward": 0.5, "kept": 3, "loss": None, "alarms": ["x"], "dropped": {"y": 1}, "gap": float("nan")}
    assert scalars(row) == {"reward": 0.5, "kept": 3.0}
