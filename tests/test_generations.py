"""Generations: the recipe of each is derived from the user's, evidence is read, decisions are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from limbeck.config.load import load
from limbeck.config.validate import check_references
from limbeck.eval.gate import Check, Decision
from limbeck.eval.statistics import mean_interval
from limbeck.pipeline.generations.evidence import Measured, decide
from limbeck.pipeline.generations.iteration import Iteration
from limbeck.pipeline.generations.ledger import Entry, open_ledger, to_json
from limbeck.pipeline.generations.recipes import find_plan, recipe_of, replaced_stages, suffixed
from limbeck.pipeline.graph import Graph, nodes_of
from limbeck.pipeline.store import Store
from limbeck.report.ledger_page import check_sentence, render
from limbeck.types import LimbeckError, Resumable


def derived(name: str, promoted: list[bool], *overrides: str):
    """The recipe of a generation, and the stage of the model that it has to beat."""
    recipe = load(name, overrides)
    return recipe_of(recipe, find_plan(recipe), promoted)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", ["quickstart", "generations"])
@pytest.mark.parametrize("promoted", [[], [True], [True, False], [True, True, False, True]])
def test_every_generation_is_a_recipe(name, promoted):
    recipe, champion = derived(name, promoted)
    check_references(Path("derived"), recipe)
    again = load(recipe)  # as it is read from the run's folder
    assert again.stages == recipe.stages
    models = {node.name.partition("/")[2] for node in nodes_of(recipe) if node.kind == "evaluate"}
    assert models == {champion, suffixed(find_plan(load(name)).model, len(promoted) + 1)}


def test_the_first_generation_is_what_leads_to_the_model():
    recipe, champion = derived("quickstart", [])
    original = load("quickstart").stages
    assert champion == "base" and "small" not in recipe.stages and "outputs" not in recipe.stages
    for name in ("base", "zero", "coldstart", "general", "dev3", "r1"):
        assert recipe.stages[name] == original[name]


def test_the_champion_teaches_and_the_base_learns_again():
    recipe, champion = derived("quickstart", [True])
    stages = recipe.stages
    assert champion == stages["traces_g2"].model == stages["harder_g2"].model == "r1"
    assert stages["dev1_g2"].model == "base" and stages["dev1_g2"].rows == {"coldstart_g2": 1.0}
    assert stages["dev3_g2"].rows == {"reasoning_g2": 1.0, "general": 1.0}  # general rows are as before
    assert "zero_g2" not in stages
    shares = stages["r1_g2"].problems
    assert shares == pytest.approx({"harder_g2": 0.7, "clock": 0.3 * 0.85, "chat": 0.3 * 0.15})


def test_generations_go_on_with_the_last_model_if_they_should():
    recipe, _ = derived("quickstart", [True], "iterate={start: last}")
    assert recipe.stages["dev1_g2"].model == recipe.stages["dev3_g2"].model == "r1"
    recipe, champion = derived("harder", [True, True], "iterate={model: zero, start: last}")
    assert recipe.stages["zero_g3"].model == champion == "zero_g2"


CLIMB = """
name: climb
problems: {small: {source: sums}, large: {source: sums, largest: 99}}
stages:
  base: {kind: load, path: base}
  zero: {kind: rl, model: base, problems: {small: 1}}
  climb: {kind: screen, model: zero, problems: {large: 1}}
  long: {kind: rl, model: zero, problems: {climb: 1}}
  traces: {kind: sample, model: long, problems: {large: 1}}
  taught: {kind: sft, model: base, rows: {traces: 1}}
  last: {kind: rl, model: taught, problems: {climb: 0.7, small: 0.3}}
  asked: {kind: evaluate, models: [last], problems: [large, small]}
iterate: {model: last, base: base, teacher: long, evaluation: asked}
"""


def test_a_screen_stage_of_the_recipe_asks_the_champion(tmp_path):
    """Then there is no other one; and models between base and teacher are replaced like the teacher."""
    (tmp_path / "climb.yaml").write_text(CLIMB)
    recipe = load(tmp_path / "climb.yaml")
    plan = find_plan(recipe)
    assert replaced_stages(recipe, plan) == ["zero", "long"]
    assert (plan.better, plan.general, plan.mode) == (("large",), ("small",), "t1")
    second, champion = recipe_of(recipe, plan, [True])
    check_references(Path("derived"), second)
    assert second.stages["climb_g2"].model == second.stages["traces_g2"].model == champion == "last"
    assert "harder_g2" not in second.stages
    assert second.stages["last_g2"].problems == {"climb_g2": 0.7, "small": 0.3}


def test_the_champion_may_write_as_much_as_it_learned_to():
    """Where it takes the place of a teacher with shorter responses; or as much as is set."""
    short = "stages.traces.sampling={max_new_tokens: 40}"
    recipe, _ = derived("quickstart", [True], short)
    assert recipe.stages["traces_g2"].sampling.max_new_tokens == 192
    assert recipe.stages["reasoning_g2"].sampling.max_new_tokens == 192  # it asks another model
    recipe, _ = derived("quickstart", [True], short, "iterate={max_new_tokens: 64}")
    assert recipe.stages["traces_g2"].sampling.max_new_tokens == 64
    assert recipe.stages["reasoning_g2"].sampling.max_new_tokens == 192


def test_who_was_refused_leaves_no_trace_but_another_seed():
    third, champion = derived("quickstart", [True, False])
    second, _ = derived("quickstart", [True])
    assert champion == "r1" and not any(name.endswith("_g2") for name in third.stages)
    before = {name.replace("_g2", "_g3"): stage for name, stage in second.stages.items()}
    assert set(before) == set(third.stages)  # the same stages, whose names are part of their seeds
    fourth, champion = derived("quickstart", [True, False, True])
    assert champion == "r1_g3" and fourth.stages["traces_g4"].model == "r1_g3"


def test_what_was_computed_keeps_its_key(tmp_path):
    """So a stage of an earlier generation is in the store, and is not computed again."""
    recipe = load("generations")
    keys = []
    for promoted in ([], [True]):
        graph = Graph(recipe_of(recipe, find_plan(recipe), promoted)[0], Store(tmp_path), tmp_path)
        keys.append(graph.nodes["base"].key)
    original = Graph(recipe, Store(tmp_path), tmp_path)
    assert keys[0] == keys[1] == original.nodes["base"].key is not None


@pytest.mark.parametrize(
    "name, overrides, says",
    [
        ("smoke", [], "nothing says which stage is the model of a generation"),
        ("harder", ["iterate={model: zero}"], "needs a teacher"),
        ("quickstart", ["iterate={teacher: small_base}"], "r1 does not depend on small_base"),
        ("quickstart", ["iterate={model: r2}"], "iterate.model cites r2, which is no stage with a model"),
        ("quickstart", ["iterate={gate: {problems: [cloc]}}"], "did you mean clock?"),
        ("quickstart", ["iterate={gate: {mode: t06}}", "stages.evaluation.modes=[t1]"], "compares t06"),
        (
            "quickstart",
            ["stages.evaluation.problems=[chat]", "iterate.gate.problems=[clock]"],
            "clock, which",
        ),
        ("quickstart", ["iterate={model: r1, base: r1}"], "model and base are both r1"),
        ("quickstart", ["iterate={tacher: zero}"], "did you mean teacher?"),
    ],
)
def test_a_mistake_is_one_sentence(name, overrides, says):
    with pytest.raises(LimbeckError, match=".") as error:
        find_plan(load(name, overrides))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_a_generation_needs_is_not_the_users():
    with pytest.raises(LimbeckError, match="needs the name dev1_g2"):
        derived("quickstart", [True], "problems.dev1_g2={source: miniature}")


# ---------------------------------------------------------------- evidence


def write_evaluation(folder: Path, accuracy: float, seed: int, text: str = "we try") -> Path:
    """The folder of an evaluation with 200 problems of `clock` and 100 of `chat`, two responses each."""
    dice = np.random.default_rng(seed)
    hard = np.random.default_rng(0).random(300)
    rows = []
    for i in range(300):
        source, chance = ("clock", min(1.0, accuracy * (0.5 + hard[i]))) if i < 200 else ("chat", 1.0)
        right = (dice.random(2) < chance).astype(float).tolist()
        rows.append(
            {"source": source, "mode": "t1", "problem": f"p{i}", "prompt": "say it", "right": right}
            | {"text": f"<think>{text}</think>4"}
        )
    folder.mkdir(parents=True)
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {name: {"modes": {"t1": {"length": 20.0 + seed}}} for name in ("clock", "chat")}
    (folder / "evaluation.json").write_text(json.dumps({"sources": sources}))
    return folder


def checks(tmp_path: Path, after: Path, votes: list[int] | None = None) -> dict[str, Check]:
    """The checks of a candidate against a champion that is right in half of the responses."""
    before = write_evaluation(tmp_path / "before", 0.5, 1)
    decision = decide(find_plan(load("quickstart")), before, after, votes or [])
    return {check.name: check for check in decision.checks}


def test_the_evidence_is_accuracy_language_and_general_ability(tmp_path):
    found = checks(tmp_path, write_evaluation(tmp_path / "after", 0.8, 2))
    assert list(found) == ["accuracy", "language", "general"]
    assert found["accuracy"].n == found["language"].n == 200 and found["general"].n == 100
    assert all(check.passed for check in found.values())
    assert "is better" in check_sentence(found["accuracy"]).en


def test_items_of_named_benchmarks_are_general_ability(tmp_path):
    """Each item counts as a problem; those that one evaluation alone has do not."""
    after = write_evaluation(tmp_path / "after", 0.8, 2)
    before = write_evaluation(tmp_path / "before", 0.5, 1)
    for folder, right, items in ((before, True, range(300)), (after, False, range(1, 400))):
        rows = [{"suite": "gsm8k", "item": i, "verdicts": {"strict": [[right]]}} for i in items]
        (folder / "suite_items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    general = decide(find_plan(load("quickstart")), before, after).checks[2]
    assert (general.n, general.difference, general.passed) == (399, pytest.approx(-299 / 399), False)


def test_another_language_is_refused(tmp_path):
    found = checks(tmp_path, write_evaluation(tmp_path / "after", 0.8, 2, text="试 try 试 试"))
    assert found["accuracy"].passed and not found["language"].passed
    assert "not ruled out" in check_sentence(found["language"]).en
    assert "不能排除" in check_sentence(found["language"]).zh


def test_votes_count_once_there_are_enough(tmp_path):
    after = write_evaluation(tmp_path / "after", 0.8, 2)
    assert "arena" not in checks(tmp_path, after, [-1] * 29)
    before = tmp_path / "before"
    for votes, passed in (([-1] * 30, False), ([1, 1, 0] * 20, True)):
        arena = decide(find_plan(load("quickstart")), before, after, votes).checks[-1]
        assert (arena.name, arena.passed) == ("arena", passed)


# ---------------------------------------------------------------- the loop and the ledger


class Runs:
    """Carries recipes out without computing: a run's index, and evaluations of models of given accuracy."""

    def __init__(self, home: Path, accuracies: list[float]):
        self.home, self.accuracies, self.carried, self.said = home, accuracies, [], []

    def carry_out(self, recipe) -> None:
        self.carried.append(recipe.name)
        generation = int(recipe.name.rpartition("-g")[2])
        index = {}
        for number, node in enumerate(nodes_of(recipe)):
            name = f"{node.kind}-{node.name.replace('/', '-')}"
            index[node.name] = name
            folder = self.home / "store" / name
            if folder.exists():
                continue
            if node.kind == "evaluate":
                ours = suffixed("r1", generation) in node.name
                accuracy = self.accuracies[generation if ours else generation - 1]
                write_evaluation(folder, accuracy, 10 * generation + number)
            folder.mkdir(parents=True, exist_ok=True)
            manifest = {"kind": node.kind, "stage": node.name, "seconds": 2.0, "flops": 6e9, "tokens": 10}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        (self.home / recipe.name).mkdir(parents=True)
        (self.home / recipe.name / "stages.json").write_text(json.dumps(index))

    def open(self, votes=lambda champion, candidate: [], *overrides: str) -> Iteration:
        recipe = load("quickstart", overrides)
        return Iteration(recipe, self.home, self.carry_out, votes, self.said.append)


def test_the_better_is_promoted_the_other_refused_and_the_ledger_goes_on(tmp_path):
    runs = Runs(tmp_path, [0.2, 0.4, 0.7, 0.7])
    assert runs.open().advance(1).promoted == [True]
    ledger = runs.open().advance(3)  # another process
    assert runs.carried == ["quickstart-g1", "quickstart-g2", "quickstart-g3"]
    assert ledger.promoted == [True, True, False]
    assert ledger.best.candidate.stage == "r1_g2" and ledger.entries[2].champion.stage == "r1_g2"
    assert ledger == runs.open().ledger == runs.open().advance(2)  # read again, nothing is done again
    assert (ledger.gates, ledger.rate()) == (2, pytest.approx(0.1))
    second = ledger.entries[1]
    added = {"traces", "coldstart", "dev1", "dev2", "reasoning", "dev3", "r1", "harder"}
    assert second.training == {
        "seconds": 2.0 * len(added),
        "flops": 6e9 * len(added),
        "tokens": 10 * len(added),
    }
    assert second.candidate.seconds_per_right == pytest.approx(2.0 / second.candidate.right)


def test_a_kill_between_run_and_decision_loses_nothing(tmp_path):
    runs = Runs(tmp_path, [0.2, 0.4])

    def killed(recipe) -> None:
        runs.carry_out(recipe)
        raise Resumable("killed")

    recipe = load("quickstart")
    with pytest.raises(Resumable):
        Iteration(recipe, tmp_path, killed, lambda *models: [], runs.said.append).advance(1)
    again = Iteration(recipe, tmp_path, lambda recipe: None, lambda *models: [], runs.said.append)
    assert again.advance(1).promoted == [True]


def test_a_decision_waits_for_votes_if_it_should(tmp_path):
    runs = Runs(tmp_path, [0.2, 0.4, 0.7])
    wait = "iterate={gate: {wait_for_votes: true, votes: 40}}"
    with pytest.raises(
        Resumable, match="there are 3 of 40: serve both models with `limbeck serve rl-r1 rl-r1_g2"
    ):
        runs.open(lambda *models: [1, 0, 1], wait).advance(2)
    asked = []
    again = Iteration(
        load("quickstart", [wait]),
        tmp_path,
        lambda recipe: None,
        lambda *models: asked.append(models) or [1] * 40,
        runs.said.append,
    )
    entry = again.advance(2).entries[1]
    assert asked == [("rl-r1", "rl-r1_g2")]
    assert entry.promoted and entry.decision.checks[-1].name == "arena"


def test_a_ledger_of_other_settings_is_refused(tmp_path):
    runs = Runs(tmp_path, [0.2, 0.4])
    runs.open().advance(1)
    assert runs.open(lambda *models: [], "workers=1").ledger.promoted == [True]
    with pytest.raises(
        LimbeckError, match="is of other settings of quickstart; give this recipe another name"
    ):
        runs.open(lambda *models: [], "stages.zero.steps=7")


def test_the_page_shows_numbers_decisions_and_no_money_that_is_not_known(tmp_path):
    ledger = Runs(tmp_path, [0.2, 0.4, 0.7, 0.7]).open().advance(3)
    page = render(ledger, None)
    for text in ("r1_g2", "<svg", "which is better", "not shown to be better", "promoted", "refused", "晋升"):
        assert text in page
    assert "no price of an hour" in page and "at most 10%" in page
    priced = render(ledger, 1.8)
    assert "1.8 dollars an hour" in priced
    told = to_json(ledger.entries[1], 1.8)
    assert told["candidate"]["dollars_per_right"] == pytest.approx(
        0.0005 * told["candidate"]["seconds_per_right"]
    )


def test_a_page_escapes_what_a_recipe_says(tmp_path):
    measured = Measured("<b>", "rl-1", mean_interval([[1.0], [0.0]]), 3.0, 1.0, 0.0, 0, 2)
    costs = {"seconds": 1, "flops": 0, "tokens": 0}
    entry = Entry(1, "x-g1", measured, measured, Decision(0.05, ()), True, costs)
    page = render(open_ledger(load("quickstart"), tmp_path).with_entry(entry), None)
    assert "<b>" not in page and "&lt;b&gt;" in page
