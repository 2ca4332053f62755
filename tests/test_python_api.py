"""The interface for Python: settings as keywords, results as rows, threads, interrupts, errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import answer, digests, until

import limbeck
from limbeck import LimbeckError, Recipe, Resumable, Run, SamplingParams
from limbeck.api import run as api_run
from limbeck.pipeline import run_status
from limbeck.pipeline.run import Quiet
from limbeck.run_log import METRICS

MINE = {
    "name": "mine",
    "threads": 1,
    "problems": {"chat": {"source": "miniature", "modulus": 3, "numbers": 3, "largest": 2, "task": "repeat"}},
    "stages": {
        "base": {
            "kind": "pretrain",
            "problems": "chat",
            "tokens": 3000,
            "batch_tokens": 512,
            "log_every": 1,
            "save_every": 600,
            "shape": {"hidden_size": 16, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate_size": 32},
        }
    },
}


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings", [{"stages": {"base": {"tokens": 1024}}}, {"stages.base.tokens": 1024}, {"seed": 3}]
)
def test_settings_replace_those_of_the_recipe(settings):
    changed = Recipe.load(MINE, **settings)
    assert (changed.stages["base"].tokens, changed.seed) == ((3000, 3) if "seed" in settings else (1024, 0))
    assert changed.stages["base"].batch_tokens == 512  # the rest of a mapping stays
    assert MINE["stages"]["base"]["tokens"] == 3000


def test_a_recipe_is_a_path_a_name_a_mapping_or_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(limbeck.Recipe.load(MINE).model_dump_json())
    recipes = [Recipe.load(source) for source in (path, str(path), MINE, Recipe.load(MINE))]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert Recipe.load("smoke").name == "smoke"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": {"base": {"tokenz": 3}}}, "unknown key stages.base.tokenz; did you mean tokens?"),
        ({"stages.base.tokens": "many"}, "stages.base.tokens"),
        ({"name.first": 1}, "name is not a mapping, so it has no key first"),
        ({"name": "../elsewhere"}, "names a folder"),
        ({"stages": {"after": {"kind": "sft", "model": "nobody", "rows": {"base": 1}}}}, "nobody"),
    ],
)
def test_a_mistake_is_the_sentence_of_the_command_line(settings, said, tmp_path):
    with pytest.raises(LimbeckError, match=said.replace("?", r"\?")) as error:
        limbeck.run(MINE, runs=tmp_path, display=Quiet(), **settings)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_command_line_and_python_say_the_same(tmp_path):
    code, _, said = answer("run", "smoke", "--runs", tmp_path, "--set", "stages.zero.stepz=3")
    with pytest.raises(LimbeckError) as error:
        Recipe.load("smoke", stages={"zero": {"stepz": 3}})
    assert code == 2 and said == f"limbeck: {error.value}\n"


# ---------------------------------------------------------------- results


def test_results_are_rows(finished):
    run = Run(finished.home / "tiny")
    assert repr(run).endswith("10 of 10 stages done)") and run.state == "finished"
    assert (
        repr(run["zero"]).startswith("StageResult(name='zero', kind='rl', ") and len(repr(run["zero"])) < 300
    )
    assert list(run.models) == ["brought", "base", "zero", "dev1"] and run.artifacts["zero"].is_dir()
    steps = [row["step"] for row in run.metrics if row["stage"] == "zero"]
    assert steps == list(range(8)) and {"reward", "accuracy", "loss"} <= set(run["zero"].metrics[0])
    assert {row["mode"] for row in run.evaluations} >= {"t1", "greedy"}
    assert all(row["low"] <= row["mean"] <= row["high"] for row in run.evaluations)
    assert len(run["general"].rows) == 40 and run.report.name == "index.html"
    assert run.recipe.stages["zero"].steps == 8


def test_a_model_of_a_run_is_an_engine(finished):
    run = Run(str(finished.home / "tiny"))
    sampling = SamplingParams(max_new_tokens=8)
    alone = run["zero"].model().generate(["use 1 2 2 make 0 ?"], sampling, seed=1)
    engine = limbeck.Engine.load(run.models["zero"])
    both = engine.generate(["use 1 1 2 make 1 ?", "use 1 2 2 make 0 ?"], sampling, seed=1)
    assert both[1].tokens.tolist() == alone[0].tokens.tolist()


@pytest.mark.parametrize("name, said", [("nobody", "has no stage nobody; it has"), ("general", "makes none")])
def test_what_is_not_there_is_one_sentence(finished, name, said):
    with pytest.raises(LimbeckError, match=said):
        Run(finished.home / "tiny")[name].model()
    with pytest.raises(LimbeckError, match="is no run"):
        Run(finished.home / "store")
    with pytest.raises(LimbeckError, match="nowhere"):
        limbeck.Engine.load("nowhere")


# ---------------------------------------------------------------- execution


@pytest.mark.slow
def test_a_thread_runs_a_recipe_and_signals_stay_as_they_were(tmp_path, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = []
    thread = threading.Thread(target=lambda: done.append(limbeck.run(MINE, runs=str(tmp_path))))
    thread.start()
    thread.join(200)
    assert done[0].state == "finished" and len(done[0].metrics) == 6
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    said = capfd.readouterr()
    assert said.out == "" and "base: done in" in said.err


@pytest.mark.slow
def test_a_notebook_prints_plain_lines_below_its_cell(tmp_path, capsys, monkeypatch):
    shell = type("ZMQInteractiveShell", (), {})()
    ipython = type(sys)("IPython")
    ipython.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    limbeck.run(MINE, runs=tmp_path)
    said = capsys.readouterr()
    assert "base: begins\n" in said.out and "\x1b" not in said.out and said.err == ""
    monkeypatch.delitem(sys.modules, "IPython")
    assert type(api_run._display()).__name__ == "Lines"


@pytest.mark.slow
def test_a_run_in_a_thread_can_be_paused(tmp_path):
    errors = []

    def execute() -> None:
        try:
            limbeck.run(MINE, runs=tmp_path, display=Quiet(), **{"stages.base.tokens": 4_000_000})
        except Resumable as error:
            errors.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    until(lambda: list(tmp_path.glob(f"store/.partial/*/{METRICS}")))
    Run(tmp_path / "mine").pause()
    thread.join(200)
    assert len(errors) == 1 and Run(tmp_path / "mine").state == "paused"


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on_and_ends_with_the_same_bytes(tmp_path):
    """Even from its checkpoint: nothing else was saved, as `save_every` is ten minutes."""
    settings = {"stages.base.tokens": 200_000}
    script = (  # a shell ignores SIGINT in what it starts in the background, and so does all that this starts
        "import limbeck, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"limbeck.run({MINE!r}, runs={str(tmp_path / 'killed')!r}, auto=True, **{settings})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(limbeck.__file__).parents[1])}
    program = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, env=environment)
    until(lambda: list((tmp_path / "killed").glob(f"store/.partial/*/{METRICS}")))
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=200)
    assert said.decode().strip().endswith("KeyboardInterrupt") and b"stopping after a checkpoint" in said
    assert run_status.status(tmp_path / "killed" / "mine").state == "paused"
    assert list((tmp_path / "killed").glob("store/.partial/*/state.pt"))
    for home in ("killed", "whole"):
        limbeck.run(MINE, runs=tmp_path / home, display=Quiet(), **settings)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
