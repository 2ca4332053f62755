"""`limbeck init`: three questions, a recipe with comments that loads, and one sentence for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from limbeck import cli
from limbeck.cli import first_recipe, init, recipe_plan
from limbeck.config.load import load
from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.store import Store
from limbeck.plan import machine_rates
from limbeck.plan.machine_rates import Rates
from limbeck.types import LimbeckError

ROWS = [
    {"question": f"Ann has {n} apples and gets 3 more. How many apples?", "answer": n + 3} for n in range(40)
]


def even(models, worlds, *_) -> Rates:
    """A machine that takes 2 ms for a token learned, 1 ms for one sampled and 0.1 s for a step."""
    roll = {"8": 0.108, "64": 0.164}
    measured = {
        use: [{"layers": asked.layers[0], "learn": {"1000": 2.0, "4000": 8.0}, "roll": roll}]
        for use, asked in models.items()
    }
    depth = {use: asked.config.layers for use, asked in models.items()}
    return Rates(1e11, 1e10, 3.0, dict.fromkeys(worlds, 2e-6), measured, depth, dict.fromkeys(models, 1e4))


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch) -> Path:
    """A folder with a pulled model and problems, on a machine whose rates are known."""
    sizes = ModelConfig("llama", tokenizer.size, 16, 1, 2, 1, 8, 32, max_positions=128)
    weights.save(Decoder(sizes).initialize(0), tmp_path / "models" / "mine", tokenizer)
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "problems.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine_rates, "measure", even)
    return tmp_path


MINE = ("--model", "mine", "--problems", "problems.jsonl")


def seconds(recipe: Path) -> float:
    """The planner's forecast of a recipe."""
    graph = Graph(load(recipe), Store(recipe.parent / "runs" / "store"), recipe.parent)
    return recipe_plan.forecast_here(graph).total(graph)[0]


# ---------------------------------------------------------------- what it writes


def test_the_recipe_loads_and_fits_the_time(place, call):
    code, out, _ = call("init", *MINE, "--minutes", 5)
    assert code == 0
    assert "40 rows; problem = question" in out and "answer = answer ('3')" in out
    assert all(f"limbeck {command} problems.yaml" in out for command in ("try", "plan", "run"))
    recipe = load("problems.yaml")
    assert list(recipe.stages) == ["base", "zero", "evaluation", "report"]
    assert recipe.stages["evaluation"].models == ["base", "zero"]
    assert recipe.problems["problems"].held_out == 10
    foreseen = seconds(place / "problems.yaml")
    assert 300 - 10 * foreseen / recipe.stages["zero"].steps < foreseen <= 300
    assert "# Reinforcement learning" in (place / "problems.yaml").read_text()
    code, out, err = call("plan", "problems.yaml")
    assert code == 0 and "base" in out
    assert "stages.base.licence" in err  # the model names no licence, and the plan says what to do


def test_with_more_time_the_problems_are_screened(place, call):
    steps = {}
    for minutes in (5, 30, 120):
        assert call("init", f"m{minutes}.yaml", *MINE, "--minutes", minutes)[0] == 0
        recipe = load(f"m{minutes}.yaml")
        steps[minutes] = recipe.stages["zero"].steps
        assert seconds(place / f"m{minutes}.yaml") <= 60 * minutes
    assert steps[5] < steps[30] < steps[120]
    assert list(recipe.stages)[:3] == ["base", "sometimes", "zero"]
    assert recipe.stages["zero"].problems == {"sometimes": 1}


def test_it_asks_at_a_terminal(place, monkeypatch):
    monkeypatch.setattr(init, "at_terminal", lambda: True)
    done = CliRunner().invoke(cli.app, ["init"], input="mine\n\n30\n")
    assert done.exit_code == 0, done.output
    assert done.output.count("?") >= 3 and "[problems.jsonl]" in done.output
    assert load("problems.yaml").stages["base"].path == "mine"


def test_yes_takes_the_defaults_and_asks_nothing(place, call):
    assert call("init", "--model", "mine", "--yes")[0] == 0
    assert load("problems.yaml").problems["problems"].path == "problems.jsonl"


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:1] * 8])
def test_too_few_different_problems_are_one_sentence_that_names_no_key_of_a_recipe(place, call, rows):
    (place / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = call("init", "--model", "mine", "--problems", "few.jsonl", "--minutes", 30)
    assert code == 2 and "no different one is left to learn from; add rows" in err
    assert "problems.few" not in err and not Path("few.yaml").exists()


def test_the_miniature_brings_its_problems(place, call):
    assert call("init", "--model", "miniature", "--minutes", 200)[0] == 0
    recipe = load("miniature.yaml")
    assert recipe.problems["miniature"].source == "miniature"
    assert recipe.stages["base"].kind == "pretrain" and seconds(place / "miniature.yaml") <= 12000


def test_a_generator_of_short_sums(place, call):
    pytest.importorskip("reasoning_gym")
    code, out, _ = call("init", "--model", "mine", "--problems", "chain_sum", "--minutes", 60)
    assert code == 0 and "problems of reasoning-gym" in out
    problems = load("chain_sum.yaml").problems["chain_sum"]
    assert (problems.generator, problems.answer) == ("chain_sum", "final")


def test_paths_are_those_of_the_recipe_s_folder(place, call):
    (place / "sub").mkdir()
    assert call("init", "sub/mine.yaml", "--model", "models/mine", *MINE[2:], "--minutes", 30)[0] == 0
    recipe = load("sub/mine.yaml")
    assert recipe.problems["problems"].path == "../problems.jsonl"
    assert seconds(place / "sub" / "mine.yaml") > 0  # problems and model are found


def test_words_in_a_box_and_other_columns(place, call):
    rows = [
        {"ask": f"What is the colour of cube {n}?", "gold": ["red", "dark blue"][n % 2]} for n in range(9)
    ]
    (place / "cubes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--model", "mine", "--problems", "cubes.jsonl", "--minutes", 600)
    code, _, err = call("init", *arguments)
    assert code == 2 and "cubes.jsonl, line 1: no column problem" in err and "--columns problem=NAME" in err
    code, out, err = call("init", *arguments, "--columns", "problem=ask,answer=gold")
    assert code == 0, err
    assert "answer = gold ('red')" in out
    problems = load("cubes.yaml").problems["cubes"]
    assert problems.answer == "boxed" and "\\boxed{}" in problems.template


def test_rows_without_a_readable_answer_are_counted(place, call):
    with open("problems.jsonl", "a", encoding="utf-8") as file:
        file.write('{"question": "Why?", "answer": "because of this and that and many other things"}\n')
    code, out, _ = call("init", *MINE, "--minutes", 30)
    assert code == 0 and "1 row has an answer that cannot be read, and is left out" in out


@pytest.mark.parametrize("size, limit", [(10, 40), (200, 104), (9000, 512)])
def test_long_questions_get_long_answers(size, limit):
    assert first_recipe.problems._tokens(["x" * size] * 10, "final") == limit


def test_without_a_forecast_it_says_so_and_takes_a_usual_size(place, call, monkeypatch):
    def unforeseen(*_):
        raise LimbeckError("this machine could not be measured")

    monkeypatch.setattr(recipe_plan, "forecast_here", unforeseen)
    code, out, _ = call("init", *MINE, "--minutes", 5)
    assert code == 0 and "not foreseen: this machine could not be measured" in out
    assert load("problems.yaml").stages["zero"].steps == first_recipe.sizes.UNFORESEEN


def test_names_that_yaml_or_a_stage_takes(place, call):
    for file, name in (("12.jsonl", "problems_12"), ("zero.jsonl", "problems_zero"), ("a b.jsonl", "a_b")):
        (place / "problems.jsonl").rename(place / file)
        assert call("init", *MINE[:3], file, "--minutes", 5)[0] == 0
        assert list(load(f"{name}.yaml").problems) == [name]
        (place / file).rename(place / "problems.jsonl")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--model is missing"),
        (["--model", "mine"], "--problems is missing"),
        ([*MINE], "--minutes is missing"),
        ([*MINE, "--minutes", "1"], "give --minutes"),
        (["there.yaml", *MINE, "--minutes", "30"], "there.yaml exists and is not overwritten"),
        (["there.txt", *MINE, "--minutes", "30"], "there.txt: a recipe is a YAML file"),
        (["none/a.yaml", *MINE, "--minutes", "30"], "none: no such folder"),
        (["--model", "nobody", *MINE[2:], "--minutes", "30"], "--model: model nobody"),
        (["--model", "mine", "--problems", "none.jsonl", "--minutes", "30"], "none.jsonl: no such file"),
        (["--model", "mine", "--problems", "a.json", "--minutes", "30"], "a.json: not JSONL"),
        (["--model", "mine", "--problems", "empty.jsonl", "--minutes", "30"], "the file has no rows"),
        (["--model", "mine", "--problems", "bad.jsonl", "--minutes", "30"], "bad.jsonl, line 2: not valid"),
        (["--model", "mine", "--problems", "list.jsonl", "--minutes", "30"], "list.jsonl, line 2: not a"),
        (["--model", "mine", "--problems", "less.jsonl", "--minutes", "30"], "less.jsonl, line 2: no column"),
        (["--model", "mine", "--problems", "miniature", "--minutes", "30"], "only --model miniature"),
        (["--model", "miniature", *MINE[2:], "--minutes", "30"], "--problems problems.jsonl: the miniature"),
        ([*MINE, "--minutes", "30", "--columns", "ask"], "--columns ask: write problem=NAME,answer=NAME"),
        ([*MINE, "--minutes", "30", "--columns", "answer=gold"], "no column gold among question, answer"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_nothing_is_written(place, call, arguments, words):
    good = json.dumps(ROWS[0]) + "\n"
    (place / "there.yaml").write_text("mine")
    (place / "empty.jsonl").write_text("\n")
    (place / "bad.jsonl").write_text(good + "{'question': 1}\n")
    (place / "list.jsonl").write_text(good + "[1, 2]\n")
    (place / "less.jsonl").write_text(good + '{"question": "What?"}\n')
    before = sorted(path for path in place.iterdir() if path.name != "runs")
    code, out, err = call("init", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("limbeck: ") and err.count("\n") == 1 and words in err, err
    assert sorted(path for path in place.iterdir() if path.name != "runs") == before
    assert (place / "there.yaml").read_text() == "mine"
