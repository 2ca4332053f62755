"""`limbeck compare --problems`: models that no evaluation asked the same problems are asked now, once."""

from __future__ import annotations

import json

import pytest
import tiny

from limbeck.cli.compare import to_json
from limbeck.cli.held_out import FileOptions, find_problems
from limbeck.cli.options import open_run
from limbeck.config.recipe import Evaluate, Miniature
from limbeck.model import weights
from limbeck.pipeline.comparison import compare_evaluations
from limbeck.pipeline.evaluation_run import HeldOut, prepare
from limbeck.pipeline.model_name import find_model
from limbeck.pipeline.run_folder import given_models
from limbeck.types import LimbeckError

SETTINGS = Evaluate(
    kind="evaluate", models=["model"], problems=["clock"], prompts=6, modes=["greedy"], max_new_tokens=8
)
ASKED = HeldOut(SETTINGS, {"clock": Miniature(source="miniature")})
FILE = FileOptions(held_out=2, answer="final", columns="")


@pytest.fixture
def models(decoder, tokenizer, tmp_path) -> list:
    """Two models of one name, in directories that no run knows."""
    for place in ("one", "other"):
        folder = tmp_path / place / "small"
        folder.mkdir(parents=True)
        weights.save(decoder(seed=len(place)), folder, tokenizer)
    return [find_model(tmp_path / place / "small", tmp_path) for place in ("one", "other")]


def evaluate(models, home) -> tuple[list, list]:
    """The folders of both evaluations, and the stages that were ready to run before."""
    made = prepare(models, ASKED, home, tiny.Silent(), "cpu")
    ready = [node.name for node in made.run.graph.nodes.values() if node.state != "cached"]
    nodes = tiny.carry_out(made.run, "cpu")
    return [nodes[name].artifact.folder for name in made.nodes], ready


def test_models_are_asked_once(models, tmp_path):
    """A second time, whatever the order, nothing runs; a model of the store is read where it is."""
    home = tmp_path / "runs"
    folders, ready = evaluate(models, home)
    assert len(ready) == 4  # both are loaded and asked
    assert [folder.name for folder in evaluate(models[::-1], home)[0]] == [f.name for f in folders[::-1]]
    assert evaluate(models[::-1], home)[1] == []
    stored = sorted(find_model(path, home).title for path in (home / "store").glob("load-*"))
    assert len(stored) == 2 and all(name.startswith("small-") for name in stored)
    loaded = [find_model(path, home) for path in (home / "store").glob("load-*")]
    made = prepare(loaded, ASKED, home, tiny.Silent(), "cpu")
    made.run.execute()
    given = given_models(made.run.folder, made.run.recipe)
    assert {artifact.folder.name for artifact in given.values()} == {
        f.name for f in home.glob("store/load-*")
    }
    assert all(node.state == "cached" for node in open_run(made.run.folder).nodes.values())
    comparison = compare_evaluations(models, folders)
    (results,) = to_json(comparison)["results"].values()
    assert [(result["source"], result["mode"], result["a"]["problems"]) for result in results] == [
        ("clock", "greedy", 6)
    ]
    assert comparison.a.title == "small (A)"


def test_the_problems_of_a_recipe_are_drawn_as_its_evaluation_draws_them():
    asked = find_problems("quickstart:clock", {"modes": ["greedy"], "prompts": None}, FILE)
    assert (asked.seed, asked.settings.problems, asked.settings.modes) == (
        "0/evaluation", ["clock"], ["greedy"],
    )  # fmt: skip
    assert asked.settings.prompts == find_problems("quickstart", {}, FILE).settings.prompts


def test_the_problems_of_a_file(tmp_path):
    rows = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(5)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = find_problems(str(path), {"prompts": 2}, FILE)
    assert asked.problems["mine"].held_out == 2 and asked.problems["mine"].answer == "final"
    with pytest.raises(LimbeckError, match="--held-out 5: too many"):
        find_problems(str(path), {}, FileOptions(5, "final", ""))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("a", "b", "--mode", "t1"), "need --problems"),
        (("{one}", "{one}", "--problems", "quickstart"), "are the same model"),
        (("{one}", "{other}", "--problems", "quickstart:moon"), "has clock"),
        (("{one}", "{other}", "--problems", "nothing"), "nothing"),
        (("{one}", "{other}", "--problems", "missing.jsonl"), "no such file"),
        (("{one}", "{other}", "--problems", "quickstart", "--mode", "warm"), "--mode warm: choose t1"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(models, call, tmp_path, options, says):
    one, other = (str(model.path) for model in models)
    ended = call(
        "compare", *(text.format(one=one, other=other) for text in options), "--runs", tmp_path / "runs"
    )
    assert ended.code == 2 and says in ended.err and "Traceback" not in ended.err
