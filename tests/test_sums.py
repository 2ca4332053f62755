"""Sums as a source of problems: splits, questions, worked steps and scores."""

from __future__ import annotations

import re

import numpy as np
import pytest

from limbeck.config.recipe import Recipe, Sums
from limbeck.pipeline.review.rewriting import rewrite_rows
from limbeck.tasks.registry import open_task
from limbeck.types import Completion, LimbeckError


def task(**settings):
    return open_task("sums", Sums(source="sums", **settings))


def completion(text, stopped=True):
    return Completion(np.zeros(0, int), np.zeros(0), text, stopped=stopped, sample=0)


def test_no_source_trains_on_a_sum_that_another_one_tests():
    tasks = [
        task(largest=9, size=96, held_out=30),
        task(largest=20, story=True, seed=7),
        task(max_terms=4),
        task(min_terms=3, max_terms=3, negative=True),
    ]
    terms = {
        split: {problem.data["terms"] for one in tasks for problem in one.problems(split)}
        for split in ("train", "test")
    }
    assert terms["train"] and terms["test"] and not terms["train"] & terms["test"]


@pytest.mark.parametrize("negative", [False, True])
def test_terms_keep_to_their_settings(negative):
    drawn = [
        problem.data["terms"]
        for problem in task(min_terms=3, max_terms=5, largest=12, negative=negative).problems("train")
    ]
    assert {len(terms) for terms in drawn} == {3, 4, 5}
    assert {abs(term) for terms in drawn for term in terms} == set(range(1, 13))
    lowest = min(int(np.cumsum(terms).min()) for terms in drawn)
    assert lowest < 0 if negative else lowest == 0
    assert len(set(drawn)) == len(drawn) == 2000


def test_an_expression_has_the_value_that_is_its_answer():
    for problem in task(max_terms=4, negative=True, size=50).problems("train"):
        expression = re.fullmatch(r"What is ([-+0-9 ]+)\?", problem.prompt).group(1)
        assert eval(expression) == int(problem.answer)  # digits and signs alone, by the match


def test_a_story_tells_its_terms_in_their_order():
    for problem in task(min_terms=3, max_terms=3, story=True, size=50).problems("train"):
        terms = problem.data["terms"]
        assert [int(number) for number in re.findall("[0-9]+", problem.prompt)] == [abs(t) for t in terms]
        signs = [
            word in problem.prompt.split(". ")[1].split(", then ")[i] for i, word in enumerate(["more"] * 2)
        ]
        assert signs == [term > 0 for term in terms[1:]]


def test_worked_steps_are_right_for_a_story_as_well():
    story = task(min_terms=4, max_terms=4, story=True, answer="final", size=50)
    for problem in story.problems("train"):
        text = story.work_out(problem)
        assert story.score(problem, completion(text)).parts == {
            "accuracy": 1.0,
            "format": 1.0,
            "language": 1.0,
        }
        steps = re.findall(r"([0-9]+ [-+] [0-9]+) = ([0-9]+)\.", text)
        assert len(steps) == 3 and all(eval(sum_) == int(result) for sum_, result in steps)


def test_scores_of_right_wrong_and_truncated_answers():
    sums = task(answer="final")
    problem = sums.problems("test")[0]
    answer = problem.answer
    assert sums.score(problem, completion(f"The answer is {answer}.")).parts["accuracy"] == 1
    assert sums.score(problem, completion(f"The answer is {answer}1.")).parts["accuracy"] == 0
    assert sums.score(problem, completion(f"The answer is {answer}.", stopped=False)).parts["accuracy"] == 0


def test_the_policy_steps_edits_the_answer_to_a_story():
    story = task(story=True, answer="final", size=20)
    problem = story.problems("train")[0]
    row = {
        "id": f"{problem.id}#0",
        "prompt": problem.prompt,
        "completion": f"It is {problem.answer}.",
        "origin": {},
    }
    kept, edits, notes = rewrite_rows([row], {"sums": story})
    assert kept[0]["completion"] == story.work_out(problem) == edits[0]["after"]
    assert notes["edited"] == 1


def test_a_range_with_few_sums_gives_them_all():
    few = task(largest=2, size=10, held_out=5)
    drawn = {problem.data["terms"] for split in ("train", "test") for problem in few.problems(split)}
    assert drawn == {(1, 1), (1, 2), (2, 1), (2, 2), (1, -1), (2, -1), (2, -2)}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("min_terms: 5, max_terms: 3", r"max_terms \(3\) is less than min_terms \(5\)"),
        ("story: true, negative: true", "a story has no negative numbers"),
        ("largest: 1", "problems.mine.largest"),
        ("template: 'no question'", "problems.mine.template"),
    ],
)
def test_a_mistake_is_named(tmp_path, settings, sentence):
    path = tmp_path / "recipe.yaml"
    stages = "stages:\n  base: {kind: load, path: x}\n"
    path.write_text(f"name: r\nproblems:\n  mine: {{source: sums, {settings}}}\n{stages}")
    with pytest.raises(LimbeckError, match=sentence):
        Recipe.load(path)
