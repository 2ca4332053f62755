"""Problems from files and generators, mixtures of them, the parts of a reward, and test kept out of train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from limbeck.config.recipe import Files, Gym
from limbeck.tasks import rewards
from limbeck.tasks.files import FileTask
from limbeck.tasks.mixture import Mixture
from limbeck.tasks.registry import open_task
from limbeck.types import Completion, Group, LimbeckError, Problem, Score


def completion(text: str, stopped: bool = True) -> Completion:
    return Completion(np.array([1, 2]), np.array([-0.5, -0.1]), text, stopped, 0)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int = 40) -> list[dict]:
    return [{"question": f"What is {i} and {i}?", "answer": f"twice {i}\n#### {2 * i}"} for i in range(count)]


def open_file(path: Path, **settings) -> FileTask:
    return open_task(
        "own", Files(source="files", path=path.name, **{"held_out": 10, **settings}), path.parent
    )


# ---------------------------------------------------------------- files


def test_rows_become_problems(tmp_path):
    instruction = "{problem} Put it in \\boxed{}."
    task = open_file(write(tmp_path / "own.jsonl", sums()), template=instruction)
    train, test = task.problems("train"), task.problems("test")
    assert (len(train), len(test), task.skipped) == (30, 10, 0)
    problem = next(p for p in [*train, *test] if p.id == "own/17")
    assert problem.prompt == "What is 16 and 16? Put it in \\boxed{}."
    assert (problem.answer, problem.origin, problem.language) == ("32", "own.jsonl:17", "en")


def test_the_split_follows_the_content(tmp_path):
    rows = sums()
    first = open_file(write(tmp_path / "a.jsonl", rows))
    again = open_file(
        write(tmp_path / "b.jsonl", rows[::-1] + [{"question": " what IS 3 and 3? ", "answer": "6"}])
    )
    texts = [{" ".join(p.prompt.lower().split()) for p in task.problems("test")} for task in (first, again)]
    assert texts[0] == texts[1]
    assert not texts[1] & {" ".join(p.prompt.lower().split()) for p in again.problems("train")}


def test_parquet_columns_and_languages(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet

    table = {
        "aufgabe": [f"小明有{i}个苹果，又买了2个，一共几个？" for i in range(20)],
        "target": list(range(2, 22)),
    }
    arrow.parquet.write_table(arrow.table(table), tmp_path / "own.parquet")
    task = open_file(tmp_path / "own.parquet", columns={"problem": "aufgabe"}, held_out=5, limit=12)
    assert len(task.problems("train")) + len(task.problems("test")) == 12
    assert {p.language for p in task.problems("train")} == {"zh"}


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        ("", {}, ["own.jsonl", "no rows"]),
        ('{"question": "a", "answer": "1"}\n{"question": ', {}, ["line 2", "JSON"]),
        ("[1, 2]\n", {}, ["line 1", "object"]),
        ('{"frage": "a", "antwort": "1"}\n', {}, ["frage, antwort", "problems.own.columns.problem"]),
        ('{"question": "a", "antwort": "1"}\n', {}, ["question, antwort", "problems.own.columns.answer"]),
        ('{"question": "a", "answer": "1"}\n', {"columns": {"answer": "gold"}}, ["gold", "columns.answer"]),
        ('{"question": 5, "answer": "1"}\n', {}, ["line 1", "question"]),
        ('{"question": "a", "answer": null}\n' * 3, {}, ["3 of 3", "line 1", "columns.answer"]),
        ('{"question": "a", "answer": "1"}\n' * 30, {}, ["1 different", "held_out"]),
        ('{"question": "a", "answer": "1"}\n', {"template": "Think."}, ["template", "{problem}"]),
        ("\udcff", {}, ["line 1", "JSON"]),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, content, settings, words):
    path = tmp_path / "own.jsonl"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(LimbeckError) as caught:
        open_file(path, **settings)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_no_file_and_no_parquet(tmp_path):
    with pytest.raises(LimbeckError, match="no such file"):
        open_file(tmp_path / "none.jsonl")
    (tmp_path / "own.parquet").write_text("not parquet")
    with pytest.raises(LimbeckError, match="Parquet"):
        open_file(tmp_path / "own.parquet")


def test_unreadable_golds_are_dropped_and_counted(tmp_path):
    rows = sums(20) + [
        {"question": f"Prove {i}.", "answer": "It is easy to see that this must hold."} for i in range(6)
    ]
    task = open_file(write(tmp_path / "own.jsonl", rows))
    assert task.skipped == 6 and len(task.problems("train")) == 10


@pytest.mark.parametrize(
    ("text", "stopped", "parts", "reasons"),
    [
        ("wait, 2</think>\\boxed{2}", True, {"accuracy": 1, "format": 1, "language": 1}, {}),
        (
            "wait, 2</think>\\boxed{2}",
            False,
            {"accuracy": 0, "format": 1, "language": 1},
            {"accuracy": "ran out"},
        ),
        ("so</think>\\boxed{3}", True, {"accuracy": 0, "format": 1, "language": 1}, {"accuracy": "gold 2"}),
        ("so \\boxed{2}", True, {"accuracy": 1, "format": 0, "language": 1}, {"format": "think tags"}),
        (
            "1+1</think>",
            True,
            {"accuracy": 0, "format": 0},
            {"accuracy": "no \\boxed", "format": "no \\boxed"},
        ),
        (
            "先等等</think>\\boxed{2}",
            True,
            {"accuracy": 1, "format": 1, "language": 0},
            {"language": "no word"},
        ),
    ],
)
def test_scores_have_parts_and_reasons(tmp_path, text, stopped, parts, reasons):
    task = open_file(write(tmp_path / "own.jsonl", sums()))
    problem = next(p for split in ("train", "test") for p in task.problems(split) if p.answer == "2")
    score = task.score(problem, completion(text, stopped))
    assert score.parts == parts
    assert set(score.reasons) == set(reasons)
    assert all(fragment in score.reasons[part] for part, fragment in reasons.items())
    assert score.stats["reflections"] == ("wait" in text or "等等" in text)


# ---------------------------------------------------------------- generators


def open_gym(generator: str, **settings):
    pytest.importorskip("reasoning_gym")
    return open_task(
        "gym", Gym(source="gym", generator=generator, **{"size": 60, "held_out": 20, **settings}), Path()
    )


def test_a_generator_is_a_task():
    task = open_gym("chain_sum", config={"max_terms": 2, "max_digits": 2}, answer="final")
    train, test = task.problems("train"), task.problems("test")
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    again = open_gym("chain_sum", config={"max_terms": 2, "max_digits": 2}, answer="final")
    assert [p.prompt for p in again.problems("train")] == [p.prompt for p in train]
    problem = train[0]
    assert task.score(problem, completion(f"it is {problem.answer}")).parts["accuracy"] == 1
    assert task.score(problem, completion(f"it is {problem.answer}", stopped=False)).parts["accuracy"] == 0
    assert task.score(problem, completion("it is 123456")).parts["accuracy"] == 0


def test_its_own_scorer_judges_what_is_no_number(tmp_path):
    task = open_gym("countdown", size=4, held_out=2)
    problem, entry = task.problems("train")[0], task._entries[task.problems("train")[0].id]
    swapped = f"0*{entry['metadata']['numbers'][0]} + {problem.answer}"

    def accuracy(answer: str) -> float:
        return task.score(problem, completion(f"so</think>\\boxed{{{answer}}}")).parts["accuracy"]

    assert accuracy(problem.answer) == accuracy(f"({problem.answer})") == 1
    trap = tmp_path / "trap"
    for answer in [
        swapped,
        f"{entry['metadata']['target']}",
        f"open('{trap}','w')",
        "9**9**9**9",
        "x" * 600,
        "(",
    ]:
        assert accuracy(answer) == 0, answer
    assert not trap.exists()


@pytest.mark.parametrize(
    ("generator", "settings", "words"),
    [
        ("chan_sum", {}, ["problems.gym.generator", "did you mean chain_sum"]),
        ("chain_sum", {"config": {"max_term": 3}}, ["no key max_term", "did you mean max_terms"]),
        ("chain_sum", {"config": {"min_terms": 0}}, ["refuses", "min_terms must be positive"]),
        ("chain_sum", {"config": {"size": 3}}, ["problems.gym.size"]),
        (
            "coin_flip",
            {"config": {"min_trials": 3, "max_trials": 3}, "held_out": 400, "size": 2},
            ["held_out smaller"],
        ),
    ],
)
def test_a_wrong_generator_is_one_sentence(generator, settings, words):
    with pytest.raises(LimbeckError) as caught:
        open_gym(generator, **settings)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


# ---------------------------------------------------------------- mixtures


class Constant:
    """Ten problems whose accuracy is what the completion says, and never a language."""

    def __init__(self, name: str):
        self.name = name

    def problems(self, split: str) -> list[Problem]:
        return [Problem(f"{self.name}/{split}/{i}", f"{i}?") for i in range(10)]

    def score(self, problem: Problem, completion: Completion) -> Score:
        return Score({"accuracy": float(completion.text), "format": 1.0})


def mixture(weights: dict[str, float], **more) -> Mixture:
    return Mixture(
        {"a": Constant("a"), "b": Constant("b")},
        weights,
        {"accuracy": 1.0, "format": 0.2, "language": 1.0},
        **more,
    )


def test_draws_depend_on_the_seed_alone():
    mix = mixture({"a": 3, "b": 1})
    drawn = mix.draw(8, seed=(0, 5))
    assert drawn == mixture({"a": 3, "b": 1}).draw(8, seed=(0, 5)) != mix.draw(8, seed=(0, 6))
    shares = [p.id.startswith("a/") for step in range(200) for p in mix.draw(8, seed=step)]
    assert 0.7 < np.mean(shares) < 0.8
    assert all("/test/" in p.id for p in mix.draw(8, seed=1, split="test"))


def test_a_draw_repeats_nothing_before_it_must():
    ids = [p.id for p in mixture({"a": 1}).draw(25, seed=3)]
    assert set(ids[:10]) == set(ids[10:20]) and len(set(ids[20:])) == 5 and len(set(ids)) == 10


def test_subsets_stand_for_the_training_problems():
    kept = [Problem("a/train/3", "3?")]
    mix = mixture({"a": 1}, subsets={"a": kept})
    assert mix.draw(2, seed=0) == kept * 2
    assert len(mix.problems("a", "test")) == 10
    with pytest.raises(LimbeckError, match="no train problems"):
        mixture({"a": 1}, subsets={"a": []}).draw(2, seed=0)


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1}, {"a": float("nan")}, {"c": 1}])
def test_shares_that_are_none_are_refused(weights):
    with pytest.raises(LimbeckError, match="problems"):
        mixture(weights)


def test_a_group_is_scored_part_by_part():
    group = Group(Problem("b/train/1", "1?"), np.array([1]), (completion("1"), completion("0")))
    scored = mixture({"a": 1, "b": 1}).score(group)
    assert scored.rewards == (1.2, 0.2) and len(scored.scores) == 2
    assert group.scores == ()


# ---------------------------------------------------------------- parts of a reward


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("Wait, 3 + 4 = 7", "en", 1.0),
        ("先算三加四 = 7", "zh", 1.0),
        ("先算 3+4，then 7", "zh", 2 / 3),
        ("先算 3+4，then 7", "en", 1 / 3),
        ("so 我们 check it", "en", 3 / 5),
        ("\\frac{1}{2} \\times 3 <think> 7", "en", None),
        ("", "zh", None),
        ("don't 等等", "en", 1 / 3),
        ("это 7", "en", 0.0),
        ("это is", "en", 0.5),
        ("naïve café", "en", 1.0),
    ],
)
def test_language_consistency_by_hand(text, language, share):
    assert rewards.language_consistency(text, language) == (share if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("text", "style", "score"),
    [
        ("<think>a</think><answer>1</answer>", "tags", 1.0),
        ("a</think>\n<answer>1</answer>\n", "tags", 1.0),
        ("a</think>so <answer>1</answer>", "tags", 0.0),
        ("b<think>a</think><answer>1</answer>", "tags", 0.0),
        ("a</think>so \\boxed{1}", "boxed", 1.0),
        ("so \\boxed{1}", "boxed", 0.0),
        ("so 1", "final", 1.0),
        ("so", "final", 0.0),
    ],
)
def test_format(text, style, score):
    value, reason = rewards.format_score(text, style)
    assert value == score and bool(reason) == (not score)


def test_repeats_and_reflections():
    assert rewards.repeats("Try 5. No. Try 6. No.\ntry  5") == 2
    assert rewards.repeats("3.5 and 3.5") == 0
    assert rewards.reflections("Wait, check: no. 等等，3 等于 3，不对") == 5
