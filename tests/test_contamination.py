"""Copies of the test are found however they are dressed; what only looks like the test, being of its
template, is kept."""

from __future__ import annotations

import json

import pytest
import tiny
from tiny import answer

from limbeck.config.load import load
from limbeck.config.recipe import Gym, Miniature
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.provenance.lineage import find, rows_behind
from limbeck.pipeline.store import Store
from limbeck.run_log import read
from limbeck.tasks.contamination import ContaminationIndex
from limbeck.tasks.registry import open_task

pytestmark = pytest.mark.slow


def sieve(task) -> ContaminationIndex:
    test = task.problems("test")
    return ContaminationIndex(
        {p.id: p.prompt for p in test}, {p.id: p.data["question"] for p in test if "question" in p.data}
    )


def worlds(**settings):
    return [
        open_task(name, Miniature(source="miniature", task=task, **settings))
        for name, task in (("clock", "countdown"), ("chat", "repeat"))
    ]


# ---------------------------------------------------------------- the miniature, whose prompts are all alike


@pytest.mark.parametrize(
    "settings", [{}, {"numbers": 4}, {"modulus": 3, "numbers": 2, "largest": 4}], ids=str
)
def test_nothing_honest_of_the_miniature_is_dropped(settings):
    tasks = worlds(**settings)
    sieves = [sieve(task) for task in tasks]
    train = [p for task in tasks for p in task.problems("train")]
    assert len(train) > 100
    assert [
        p.id
        for p in train
        if any(
            s.fault(p.id, p.prompt, "<think> try 1 +5 gives 6 =4 gives 2 no </think> 1 +5") for s in sieves
        )
    ] == []


def test_planted_copies_of_the_miniature_are_caught_whatever_they_are_called():
    clock, _ = worlds()
    found = sieve(clock)
    for problem in clock.problems("test"):
        assert found.fault("mine/1#0", problem.prompt), problem
        assert found.fault("mine/1", problem.prompt.upper().replace(" ?", "?!")), problem
        assert found.fault(f"{problem.id}#3", "something else") == f"is {problem.id} of the test"
    assert found.fault("mine/1", f"Please: {clock.problems('test')[0].prompt} Thank you.").startswith(
        "asks the same as clock/"
    )


@pytest.mark.parametrize("generator, config", [
    ("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
    ("chain_sum", {"max_digits": 2}),
    ("simple_equations", {}),
    ("word_sorting", {}),
    ("propositional_logic", {}),
    ("leg_counting", {}),
    ("spell_backward", {}),
])  # fmt: skip
def test_of_generated_templates_every_copy_is_caught_and_nothing_else(generator, config):
    pytest.importorskip("reasoning_gym")
    task = open_task("g", Gym(source="gym", generator=generator, config=config, size=400, held_out=120))
    found = sieve(task)
    assert all(found.fault("mine/1", p.prompt) for p in task.problems("test"))
    assert [p.prompt for p in task.problems("train") if found.fault(p.id, p.prompt)] == []


# ---------------------------------------------------------------- texts

FARM = (
    "A farmer keeps 17 hens and every hen lays 4 eggs in a week; how many boxes of 6 does she fill before "
    "the market opens?"
)
TEST = {
    "t/1": FARM,
    "t/2": "小明有三个苹果，他又买了两个，妈妈再给他一个，他一共有几个苹果？",
    "t/3": "What is 3 + 4 - 5?",
    "t/4": "Name the river that runs through the capital of Portugal and say where it rises.",
}  # fmt: skip


@pytest.mark.parametrize("prompt, rest, words", [
    (FARM, "", "asks the same as t/1"),
    (f"Here is one from last year. {FARM} Think step by step.", "", "t/1"),
    (FARM.replace("she fill", "the woman fill").replace("; how", ". How"), "", "is nearly t/1"),
    ("As an example", f"I remember: {FARM}", "shares 10 words in a row with t/1"),
    ("请问：小明有三个苹果，他又买了两个，妈妈再给他一个，他一共有几个苹果？谢谢", "", "t/2"),
    ("Compute: what is 3 + 4 - 5", "", "asks the same as t/3"),
    (
        "Tell me: the river that runs through the capital of Portugal, and other things",
        "",
        "words in a row with t/4",
    ),
])  # fmt: skip
def test_dressed_copies_are_caught(prompt, rest, words):
    assert words in ContaminationIndex(TEST).fault("mine/1#0", prompt, rest)


@pytest.mark.parametrize("prompt", [
    FARM.replace("17", "19"),  # other numbers are another problem
    FARM.replace("4", "5").replace("6", "8"),
    "What is 3 + 4 + 5?", "What is 3 + 4 - 5 - 6?", "What is 13 + 4 - 5?",
    "A farmer keeps 17 cows.", "Name the capital of Portugal.", "",
])  # fmt: skip
def test_other_problems_are_kept(prompt):
    assert ContaminationIndex(TEST).fault("mine/1#0", prompt, "some answer") is None


def test_an_instruction_that_all_share_is_no_copy_and_hides_none():
    tests = {
        f"t/{i}": f"Solve the riddle carefully and give one word as the final answer in a box: {word}"
        for i, word in enumerate(RIDDLES)
    }
    found = ContaminationIndex(tests, {f"t/{i}": word for i, word in enumerate(RIDDLES)})
    assert (
        found.fault(
            "a/1",
            (
                "Solve the riddle carefully and give one word as the final answer in a box: "
                "what has teeth and bites none"
            ),
        )
        is None
    )
    assert "t/2" in found.fault("a/1", f"Another instruction altogether. {RIDDLES[2]}")


RIDDLES = (
    "what has keys but opens no door",
    "what gets wetter while it dries",
    "what has hands but claps never",
    "what runs and has no legs",
)

# ---------------------------------------------------------------- in a run

PLANTED = """
name: planted
threads: 1
problems:
  clock: {source: miniature, modulus: 3, numbers: 2, largest: 4}
  mine: {source: files, path: mine.jsonl, held_out: 2, answer: tags, licence: own}
stages:
  base:
    {kind: pretrain, problems: clock, tokens: 24000, shape: {hidden_size: 32, layers: 1, heads: 2,
     kv_heads: 2, intermediate_size: 32}}
  rows:
    {kind: sample, model: base, problems: {mine: 1}, prompts: 40, samples: 1, correct: false,
     wellformed: false, sampling: {max_new_tokens: 60}}
  taught: {kind: sft, model: base, rows: {rows: 1}, epochs: 1}
  evaluation: {kind: evaluate, models: [taught], problems: [%s], prompts: 8, max_new_tokens: 16}
"""


def test_a_run_leaves_planted_rows_out_lists_them_and_keys_them(tmp_path):
    clock = open_task("clock", Miniature(source="miniature", modulus=3, numbers=2, largest=4))
    honest = clock.problems("train")[:30]
    copies = clock.problems("test")[:3]
    lines = [{"problem": p.prompt, "answer": "1"} for p in (*honest, *copies)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = tmp_path / "planted.yaml"
    home = tmp_path / "runs"

    def run(tests: str) -> tuple[dict, str]:
        recipe.write_text(PLANTED % tests)
        code, _, err = answer("run", recipe, "--runs", home)
        assert code == 0, err
        found = Graph(load(recipe), Store(home / "store"), tmp_path)  # what `plan` sees
        assert all(node.artifact for node in found.nodes.values())
        return {name: node.artifact for name, node in found.nodes.items()}, err

    first, err = run("mine")
    assert first["rows"].manifest["decontamination"] == {"against": {"mine": 2}, "checked": 31, "dropped": {}}
    assert "rows: leaves" not in err
    second, err = run("mine, clock")
    finding = second["rows"].manifest["decontamination"]
    planted = {f"mine/{i}" for i in (31, 32, 33)} - {
        p.id for p in open_task("mine", load(recipe).problems["mine"], tmp_path).problems("test")
    }
    assert set(finding["dropped"]) == planted
    assert finding["checked"] == 31
    assert all("of the test" in why for why in finding["dropped"].values())
    assert f"rows: leaves {len(planted)} of 31 out, too near to the test" in err
    asked = {row["id"].partition("#")[0] for row in read(second["rows"].folder / "rows.jsonl")}
    assert asked
    assert not asked & planted
    assert first["rows"].manifest["key"] != second["rows"].manifest["key"]
    assert first["base"].folder == second["base"].folder
    assert {row["id"].partition("#")[0] for row in rows_behind(find("planted/taught", home))} == asked
    recipe.write_text(PLANTED % "mine")  # and back: what was made then is still there
    assert (
        Graph(load(recipe), Store(home / "store"), tmp_path).nodes["taught"].artifact.folder
        == first["taught"].folder
    )


def test_rows_that_are_too_near_are_not_learned_even_when_they_were_sampled(tmp_path, finished):
    """Rows of another run, or edited by people, pass no sampling: the stage that learns looks at them
    itself."""
    run = tiny.open_run(finished.recipe, finished.home)
    store = run.store
    before = find("dev1", finished.home)
    rows = list(read(store.root / find("coldstart", finished.home).head["artifact"] / "rows.jsonl"))
    test = open_task("clock", load(finished.recipe).problems["clock"]).problems("test")[0]
    looked = run.graph.decontamination
    looked.thorough = True
    looked.store = Store(tmp_path)
    folder = tmp_path / "planted"
    folder.mkdir()
    spoiled = [{**rows[0], "id": "desk/1#0", "prompt": test.prompt}, *rows[1:]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spoiled))
    artifact = type(run.graph.nodes["coldstart"].artifact)(folder, {"digest": "planted"})
    finding = looked.compare(run.graph.nodes["dev1"].stage, {}, {}, {"coldstart": artifact})
    assert finding.dropped == {"desk/1#0": f"asks the same as {test.id} of the test"}
    assert finding.checked == len(rows)
    assert before.head["decontamination"]["dropped"] == {}
    assert before.head["decontamination"]["checked"] > 0
