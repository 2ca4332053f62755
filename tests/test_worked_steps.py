"""Worked steps: which sums are read, right arithmetic, and rows that a curate stage rewrites with them."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.config.recipe import Files, Recipe
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.review.rewriting import rewrite_rows
from limbeck.pipeline.store import Store
from limbeck.tasks.answers import extract
from limbeck.tasks.files import FileTask
from limbeck.tasks.rewards import format_score
from limbeck.tasks.worked_steps import work_out, write_response

NUMBERS = st.integers(-(10**6), 10**6)
STEP = re.compile(r"(-?\d+) ([-+]) (-?\d+) = (-?\d+)\.")


@pytest.mark.parametrize(
    ("question", "steps"),
    [
        ("Calculate 4 - 8 + 9.", ["4 - 8 = -4.", "-4 + 9 = 5."]),
        ("State the final answer to the following arithmetic problem: 12+7 =", ["12 + 7 = 19."]),
        ("-5 - -3 = ?", ["-5 - -3 = -2."]),
        ("计算３＋４－１等于多少？", ["3 + 4 = 7.", "7 - 1 = 6."]),
        ("7 − 9", ["7 - 9 = -2."]),
        ("what is 1 + 2 + 3, please", ["1 + 2 = 3.", "3 + 3 = 6."]),
    ],
)
def test_a_sum_is_worked_out_from_left_to_right(question, steps):
    assert work_out(question) == (steps, int(steps[-1].split()[-1].rstrip(".")))


@pytest.mark.parametrize(
    "question",
    [
        "Ann has 3 apples and buys 4. How many has she?",
        "Ann has 3 apples. What is 4 + 5?",
        "What is 2 + 3, and what is 4 + 5?",
        "What is 3 + 4 * 2?",
        "What is 2 * (3 + 4)?",
        "What is -(3 + 4)?",
        "What is |3 - 5|?",
        "What is 3 + 4x?",
        "What is x + 3 - 4?",
        "What is 3 + 4 - ?",
        "What is 3.5 + 4?",
        "What is 3 + 4.5?",
        "What is 1,234 + 5?",
        "What is 3 + 4 / 2?",
        "What is 3 + 4%?",
        "What is 7?",
        "What is 1/2 + 3?",
        "9" * 5000 + " + 1",
        "",
    ],
)
def test_other_questions_give_no_steps(question):
    assert work_out(question) is None


@given(NUMBERS, st.lists(st.tuples(st.sampled_from("+-"), NUMBERS), min_size=1, max_size=8), st.booleans())
def test_every_step_is_right_and_the_last_gives_the_value(first, others, spaced):
    space = " " if spaced else ""
    total = first + sum(term if sign == "+" else -term for sign, term in others)
    written = str(first) + "".join(f"{space}{sign}{space}{term}" for sign, term in others)
    steps, value = work_out(f"What is {written} = ?")
    assert value == total and len(steps) == len(others)
    before = first
    for step, (sign, term) in zip(steps, others, strict=True):
        left, operation, right, result = STEP.fullmatch(step).groups()
        assert (int(left), operation, int(right)) == (before, sign, term)
        before = before + term if sign == "+" else before - term
        assert int(result) == before
    assert before == total


@pytest.mark.parametrize("style", ["final", "boxed", "tags"])
@pytest.mark.parametrize("question", ["4 - 8", "4 + 8"])
def test_the_answer_has_the_form_that_is_asked_for(style, question):
    response = write_response(question, style)
    assert extract(response, style).answer == str(eval(question))
    assert format_score(response, style) == (1.0, "")
    assert response.startswith(f"<think> First {question} = ")
    assert write_response("how are you?", style) is None


# ---------------------------------------------------------------- rows


@pytest.fixture
def sums(tmp_path) -> FileTask:
    """Six sums; the gold answer of the last one is wrong. One is a word problem."""
    rows = [{"question": f"What is {n} - 8 + 1?", "answer": str(n - 7)} for n in range(4)]
    rows += [{"question": "Ann has 2 and gets 3. How many?", "answer": "5"}]
    rows += [{"question": "What is 2 + 2?", "answer": "5"}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Files(source="files", path="sums.jsonl", held_out=1, answer="final")
    task = FileTask("sums", settings, tmp_path)
    task.problems = lambda split: sorted(
        [*FileTask.problems(task, "train"), *FileTask.problems(task, "test")], key=lambda p: p.id
    )
    return task


def row_of(task: FileTask, number: int, completion: str) -> dict:
    problem = task.problems("train")[number]
    return {
        "id": f"{problem.id}#0",
        "prompt": problem.prompt,
        "language": "en",
        "completion": completion,
        "reasoning_content": "",
        "content": completion,
        "tokens": [1, 2],
        "origin": {"problem": problem.origin, "sampler": "base"},
    }


def test_rows_are_rewritten_scored_again_and_recorded(sums):
    steps = "<think> First 3 - 8 = -5. Then -5 + 1 = -4. </think> The answer is -4."
    rows = [
        row_of(sums, 0, "I say -7"),
        row_of(sums, 1, "I say 6"),
        row_of(sums, 2, "I say nothing"),
        row_of(sums, 3, steps),
        row_of(sums, 4, "I say 5"),
        row_of(sums, 5, "I say 5"),
        {**row_of(sums, 4, "hello"), "id": "chat/1#0"},
    ]
    kept, rewritings, notes = rewrite_rows(rows, {"sums": sums})
    wrong, other = "the steps end in a wrong answer", "the steps end in another answer than the response"
    assert [(one["id"], one["accuracy"], one["verdict"], one["reason"]) for one in rewritings] == [
        (rows[0]["id"], 1.0, "edit", ""),
        (rows[1]["id"], 1.0, "reject", other),
        (rows[2]["id"], 1.0, "reject", other),
        (rows[3]["id"], 1.0, "accept", ""),
        (rows[5]["id"], 0.0, "reject", wrong),
    ]
    assert {one["policy"] for one in rewritings} == {"steps"}
    assert rewritings[0]["before"] == "I say -7"
    assert rewritings[0]["after"] == "<think> First 0 - 8 = -8. Then -8 + 1 = -7. </think> The answer is -7."
    assert notes == {
        "policy": "steps", "accepted": 3, "edited": 1, "rejected": 3, "reasons": {other: 2, wrong: 1}
    }  # fmt: skip
    first, same, *unchanged = kept
    assert first["completion"] == rewritings[0]["after"]
    assert (first["reasoning_content"], first["content"]) == (
        "First 0 - 8 = -8. Then -8 + 1 = -7.",
        "The answer is -7.",
    )
    assert first["origin"] == {**rows[0]["origin"], "editor": "policy: steps"} and "tokens" not in first
    assert same["tokens"] == [1, 2] and same["origin"]["editor"] == "policy: steps"
    assert unchanged == [rows[4], rows[6]]


def test_the_key_covers_the_problems_that_the_policy_scores_with(tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 2", "answer": "3"}\n')
    files = {"source": "files", "path": "sums.jsonl", "held_out": 1}
    recipe = {
        "name": "own",
        "problems": {"sums": files, "others": files, "clock": {"source": "miniature"}},
        "stages": {
            "base": {"kind": "pretrain", "problems": "clock"},
            "chosen": {"kind": "screen", "model": "base", "problems": {"sums": 1}},
            "traces": {"kind": "sample", "model": "base", "problems": {"chosen": 1}},
            "first": {"kind": "curate", "rows": "traces", "policy": "steps"},
            "second": {"kind": "curate", "rows": "first", "policy": "steps"},
            "plain": {"kind": "curate", "rows": "traces"},
        },
    }
    nodes = Graph(Recipe.load(recipe), Store(tmp_path / "store"), tmp_path).nodes
    assert {name: set(nodes[name].problems) for name in ("first", "second", "plain")} == {
        "first": {"sums"},
        "second": {"sums"},
        "plain": {"clock"},
    }
