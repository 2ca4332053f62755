"""Recipes that extend another one: what is merged, what is replaced, and what is refused."""

from __future__ import annotations

import pytest

from limbeck.config.load import load, shipped
from limbeck.types import LimbeckError

WHOLE = """
name: whole
seed: 3
problems:
  clock: {source: miniature, modulus: 5}
stages:
  base: {kind: pretrain, problems: clock, tokens: 2000}
  zero: {kind: rl, model: base, problems: {clock: 1}, steps: 7}
  evaluation: {kind: evaluate, models: [base, zero], problems: [clock], prompts: 9}
"""
MORE = """
name: more
extends: whole.yaml
stages:
  zero: {steps: 8}
  again: {kind: rl, model: zero, problems: {clock: 1}}
  evaluation: {models: [again]}
"""


def write(folder, **recipes: str) -> None:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)


def test_mappings_are_merged_and_other_values_replaced(tmp_path):
    write(tmp_path, whole=WHOLE, more=MORE)
    recipe = load(tmp_path / "more.yaml", ["stages.again.steps=2"])
    assert (recipe.name, recipe.seed, recipe.problems["clock"].modulus) == ("more", 3, 5)
    assert list(recipe.stages) == ["base", "zero", "evaluation", "again"]
    assert (recipe.stages["zero"].steps, recipe.stages["zero"].model) == (8, "base")
    assert recipe.stages["again"].steps == 2
    assert (recipe.stages["evaluation"].models, recipe.stages["evaluation"].prompts) == (["again"], 9)


def test_a_recipe_that_comes_with_limbeck_is_extended_by_its_name_through_others(tmp_path):
    write(tmp_path, one="name: one\nextends: quickstart\n", two="name: two\nextends: one.yaml\nseed: 9\n")
    recipe = load(tmp_path / "two.yaml")
    known = load(shipped()["quickstart"])
    assert (recipe.name, recipe.seed) == ("two", 9)
    assert recipe.stages == known.stages and recipe.problems == known.problems


def test_a_stage_that_is_null_is_left_out(tmp_path):
    text = "name: more\nextends: whole.yaml\nstages: {zero: null, evaluation: {models: [base]}}\n"
    write(tmp_path, whole=WHOLE, more=text)
    assert list(load(tmp_path / "more.yaml").stages) == ["base", "evaluation"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("name: more\nextends: more.yaml\n", "extends more.yaml, which extends this recipe"),
        ("name: more\nextends: round.yaml\n", "extends more.yaml, which extends this recipe"),
        ("name: more\nextends: [whole.yaml]\n", "more.yaml: extends is ['whole.yaml']; name one recipe"),
        ("name: more\nextends: quikstart\n", "quikstart: no such recipe; did you mean quickstart"),
        (
            "name: more\nextends: whole.yaml\nstages: {zero: {stepz: 1}}\n",
            "more.yaml: unknown key stages.zero",
        ),
        (
            "name: more\nextends: whole.yaml\nstages: {zero: null}\n",
            "more.yaml: stages.evaluation.models cites zero, which is no stage",
        ),
        (
            "name: more\nextends: whole.yaml\nstages: {zeero: null}\n",
            "stages.zeero is null, but whole.yaml has no such stage; it has base, zero, evaluation",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, text, said):
    write(tmp_path, whole=WHOLE, more=text, round="name: round\nextends: more.yaml\n")
    with pytest.raises(LimbeckError) as error:
        load(tmp_path / "more.yaml")
    assert said in str(error.value)
