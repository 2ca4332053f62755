"""The quickstart's world: what is right, what is never seen in training, what the base grows up on."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest

from limbeck.config.recipe import CorpusShare, Miniature
from limbeck.tasks.clock_countdown import CORPUS, OPERATIONS, WORDS, Countdown, encode_documents
from limbeck.types import Completion, Problem, Score

GOOD = "<think> try 1 -6 gives 2 *5 gives 3 =3 gives 0 yes </think> <answer> 1 -6 *5 </answer>"
QUESTION = Problem(
    "clock/en-6-1-5-3", "use 6 1 5 make 3 ?", language="en", data={"numbers": [1, 5, 6], "target": 3}
)  # fmt: skip


def said(text: str, stopped: bool = True) -> Completion:
    return Completion(np.array([1]), np.array([-0.5]), text, stopped, 0)


def judge(clock: Countdown, text: str, problem: Problem = QUESTION, stopped: bool = True) -> Score:
    return clock.score(problem, said(text, stopped))


def key(problem: Problem) -> tuple[tuple[int, ...], int]:
    return tuple(problem.data["numbers"]), problem.data["target"]


def expressions(numbers):
    for order in sorted(set(itertools.permutations(numbers))):
        for operations in itertools.product("+-*", repeat=len(order) - 1):
            yield [str(order[0]), *(f"{o}{n}" for o, n in zip(operations, order[1:], strict=True))]


def value(words: list[str], modulus: int) -> int:
    """From left to right, in Python's own arithmetic; the clock only at the end."""
    while len(words) > 1:
        words = [str(eval("".join(words[:2]))), *words[2:]]
    return int(words[0]) % modulus


# ------------------------------------------------------------------------- the judge


@pytest.mark.parametrize(
    "settings", [{}, {"modulus": 11, "numbers": 4, "largest": 8}, {"modulus": 5, "numbers": 2}]
)
def test_verdicts_equal_brute_force(settings):
    """Every expression over a problem's numbers is right exactly when its value is the target."""
    task = Countdown("clock", Miniature(source="miniature", **settings))
    problems = task.problems("test")
    for problem in problems[:: len(problems) // 4]:
        numbers, target = key(problem)
        found = 0
        for words in expressions(numbers):
            right = value(words, task.settings.modulus) == target
            score = judge(task, f"<answer> {' '.join(words)} </answer>", problem)
            assert score.parts["accuracy"] == right, words
            assert ("accuracy" in score.reasons) == (not right)
            found += right
        assert found > 0


def test_a_good_answer_earns_all_parts(clock):
    score = judge(clock, GOOD)
    assert score.parts == {"accuracy": 1.0, "format": 1.0, "language": 1.0}
    assert score.reasons == {} and score.answer == "1 -6 *5"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<answer> 1 -6 *5 </answer> <answer> 1 -6 *5 </answer>", "not exactly one answer"),
        ("<answer> 6 +1 +5 </answer> <answer> 1 -6 *5 </answer>", "not exactly one answer"),
        ("<answer> 1 -6 *5", "not exactly one answer"),
        ("1 - 6 * 5", "not exactly one answer"),
        ("", "not exactly one answer"),
        ("<answer> <answer> 1 -6 *5 </answer>", "not exactly one answer"),
        ("</answer> 1 -6 *5 <answer>", "not exactly one answer"),
        ("</answer> <answer> 1 -6 *5", "not exactly one answer"),
        ("<think> <answer> 1 -6 *5 </answer> </think>", "not exactly one answer"),
        ("<answer> </answer>", "empty"),
        ("<answer> 3 </answer>", "each number once"),
        ("<answer> 5 -1 -1 </answer>", "each number once"),
        ("<answer> 1 -6 *5 +1 -1 </answer>", "each number once"),
        ("<answer> 6 *6 +6 </answer>", "each number once"),
        ("<answer> 6 +1 +5 </answer>", "makes 5, not 3"),
        ("<answer> 1 -6 * </answer>", "no expression"),
        ("<answer> 1 6 5 </answer>", "no expression"),
        ("<answer> -1 6 </answer>", "no expression"),
        ("<answer> 1 /6 *5 </answer>", "no expression"),
        ("<answer> 1 -+ 6 +- 5 </answer>", "no expression"),
        ("<answer> 1 +- 6 +- 5 </answer>", "no expression"),
        ("<answer> 1 -6 *⁵ </answer>", "no expression"),
        ("<answer> 1 -6 *" + "5" * 5000 +" </answer>", "no expression"),
        ("<answer> try 1 -6 *5 </answer>", "no expression"),
        ("<answer> 1-6*5 </answer>", "no expression"),
    ],
)  # fmt: skip
def test_no_reward_by_tricks(clock, text, reason):
    score = judge(clock, text)
    assert score.parts["accuracy"] == 0.0
    assert reason in score.reasons["accuracy"]


def test_an_answer_that_ran_out_of_tokens_earns_nothing_for_it(clock):
    score = judge(clock, GOOD, stopped=False)
    assert score.parts["accuracy"] == score.parts["format"] == 0.0
    assert score.reasons["accuracy"] == "ran out of tokens"


@pytest.mark.parametrize(
    "text",
    [
        "<answer> 1 -6 *5 </answer>",
        "try 1 <answer> 1 -6 *5 </answer>",
        "</think> try <think> <answer> 1 -6 *5 </answer>",
        "<think> try </think> </think> <answer> 1 -6 *5 </answer>",
        "<think> <think> try </think> <answer> 1 -6 *5 </answer>",
        "try <think> try </think> <answer> 1 -6 *5 </answer>",
        "<think> try </think> try <answer> 1 -6 *5 </answer>",
        "<think> try </think> <answer> 1 -6 *5 </answer> yes",
    ],
)
def test_format_wants_one_thought_then_one_answer_and_nothing_else(clock, text):
    score = judge(clock, text)
    assert score.parts["format"] == 0.0 and "format" in score.reasons
    assert score.parts["accuracy"] == 1.0


def test_language_is_the_share_of_words_in_the_questions_language(clock):
    english = QUESTION
    chinese = Problem("clock/zh", "用 6 1 5 凑 3 ?", language="zh", data=QUESTION.data)
    text = "<think> try 6 得 wait 错 </think> <answer> 1 -6 *5 </answer>"
    assert (
        judge(clock, text, english).parts["language"] == judge(clock, text, chinese).parts["language"] == 0.5
    )
    silent = judge(clock, "<think> 6 -5 </think> <answer> 1 -6 *5 </answer>", english)
    assert "language" not in silent.parts
    foreign = judge(clock, "<think> 试 </think> <answer> 1 -6 *5 </answer>", english)
    assert foreign.parts["language"] == 0.0 and "language" in foreign.reasons


def test_a_request_to_repeat_needs_no_thought():
    chat = Countdown("chat", Miniature(source="miniature", task="repeat"))
    problem = chat.problems("test")[0]
    assert problem.prompt in (f"say {problem.answer} ?", f"说 {problem.answer} ?")
    right = judge(chat, f"<answer> {problem.answer} </answer>", problem)
    assert right.parts == {"accuracy": 1.0, "format": 1.0, "language": 1.0} and right.stats == {
        "general": 1.0
    }
    wordy = judge(chat, f"<think> try </think> <answer> {problem.answer} </answer>", problem)
    assert wordy.parts["accuracy"] == 1.0 and wordy.parts["format"] == 0.0
    assert judge(chat, "<answer> 1 </answer>", problem).parts["accuracy"] == 0.0


# ------------------------------------------------------------------------- what reflection looks like


@pytest.mark.parametrize(
    ("thought", "stats"),
    [
        ("", {"attempts": 0}),
        ("guess", {"attempts": 0, "mixed": 0, "language_consistency": 1}),
        ("try 6 -5 gives 1 *1 gives 1 =3 gives 5 no wait 1 -6 gives 2 *5 gives 3 =3 gives 0 yes",
         {"attempts": 2, "persist": 1, "verdict": 1, "mixed": 0, "language_consistency": 1}),
        ("try 6 -5 gives 1 *1 gives 1 =3 gives 5 no",
         {"attempts": 1, "persist": 0, "verdict": 1, "mixed": 0}),
        ("try 1 gives 3 =3 gives 0 no wait 1 gives 2 =3 gives 6 yes",
         {"attempts": 2, "persist": 1, "verdict": 0}),
        ("try 1 gives 4 =3 gives 1 no wait 1 gives 2 =3 gives 6 no 6",
         {"attempts": 2, "persist": 0.5, "verdict": 1}),
        ("试 1 得 4 =3 得 1 错 等 1 得 3 =3 得 0 对",
         {"attempts": 2, "persist": 1, "verdict": 1, "language_consistency": 0}),
        ("try 1 得 4 =3 gives 1 错 等 1 gives 3 =3 得 0 yes",
         {"attempts": 2, "persist": 1, "verdict": 1, "mixed": 1, "language_consistency": 0.5}),
        ("=3 gives 0 no", {"attempts": 0, "persist": 0}),
        ("try 3 =3", {"attempts": 1}),
        ("try 3 =3 wait", {"attempts": 2}),
    ],
)  # fmt: skip
def test_stats_by_hand(clock, thought, stats):
    """`persist` and `verdict` are absent where there was no chance to persist or to judge."""
    found = judge(clock, f"<think> {thought} </think> <answer> 1 -6 *5 </answer>").stats
    assert {name: found[name] for name in stats} == pytest.approx(stats)
    assert {"persist", "verdict"} & set(found) == {"persist", "verdict"} & set(stats)


# ------------------------------------------------------------------------- the split


@pytest.mark.parametrize("settings", [{}, {"modulus": 11, "numbers": 4, "largest": 4, "held_out": 0.3}])
def test_train_and_test_share_no_content_and_are_all_that_can_be_solved(settings):
    task = Countdown("clock", Miniature(source="miniature", **settings))
    world = task.settings
    train, test = ({key(p) for p in task.problems(split)} for split in ("train", "test"))
    assert not train & test
    solvable = {
        (numbers, value(words, world.modulus))
        for numbers in itertools.combinations_with_replacement(range(1, world.largest + 1), world.numbers)
        for words in expressions(numbers)
    }
    assert train | test == solvable
    assert len(test) / len(solvable) == pytest.approx(world.held_out, abs=0.01)


def test_problems_ask_for_every_order_in_both_languages(clock):
    problems = clock.problems("train") + clock.problems("test")
    assert len({p.id for p in problems}) == len({(p.prompt) for p in problems}) == len(problems)
    mine = [p for p in problems if key(p) == ((1, 5, 6), 3)]
    orders = [" ".join(order) for order in itertools.permutations("156")]
    wanted = {f"use {o} make 3 ?" for o in orders} | {f"用 {o} 凑 3 ?" for o in orders}
    assert {p.prompt for p in mine} == wanted
    assert {p.language for p in mine} == {"en", "zh"}


def test_the_split_is_the_seeds(clock):
    assert Countdown("again", Miniature(source="miniature")).sets == clock.sets
    assert Countdown("other", Miniature(source="miniature", seed=1)).sets != clock.sets


def test_requests_to_repeat_are_split_too():
    chat = Countdown("chat", Miniature(source="miniature", task="repeat"))
    train, test = ({p.answer for p in chat.problems(split)} for split in ("train", "test"))
    assert len(train | test) == 6**3 and not train & test and 0.08 < len(test) / 6**3 < 0.25


# ------------------------------------------------------------------------- the corpus


def documents(clock: Countdown, count: int, **mixture: float) -> list[list[str]]:
    return list(itertools.islice(clock.documents("test", mixture), count))


def steps(words: list[str]) -> list[bool]:
    """Is each `a +b gives c` right?"""
    gives = {language["gives"] for language in WORDS.values()}
    right = []
    for a, step, said_, c in zip(words, words[1:], words[2:], words[3:], strict=False):
        if step[0] in OPERATIONS and step[1:].isdecimal() and said_ in gives:
            right.append(value([a, step], 7) == int(c))
    return right


def test_the_corpus_holds_training_sets_only(clock):
    spoken = {
        p.prompt for p in Countdown("chat", Miniature(source="miniature", task="repeat")).problems("train")
    }
    train, seen = set(clock.sets["train"]), set()
    kinds = {"asked": 0, "said": 0, "textbook": 0}
    for words in documents(clock, 6000):
        if words[1] != "User:":
            kinds["textbook"] += 1
            continue
        question = words[2 : words.index("Assistant:")]
        if question[0] in ("say", "说"):
            kinds["said"] += 1
            assert " ".join(question) in spoken
            continue
        kinds["asked"] += 1
        assert question[0] in ("use", "用") and question[4] in ("make", "凑")
        seen.add((tuple(sorted(map(int, question[1:4]))), int(question[5])))
    assert seen <= train and len(seen) > 0.9 * len(train)
    assert min(kinds.values()) > 100


def test_arithmetic_in_the_corpus_is_right_up_to_the_slips(clock):
    """A slip is a random number of 7, and so right once in seven times; without slips nothing is wrong."""
    right = [step for words in documents(clock, 3000) for step in steps(words)]
    assert len(right) > 5000
    assert 1 - np.mean(right) == pytest.approx(0.03 * 6 / 7, rel=0.25)
    assert all(step for words in documents(clock, 1000, slip=0) for step in steps(words))
    wild = [step for words in documents(clock, 1000, slip=1) for step in steps(words)]
    assert np.mean(wild) == pytest.approx(1 / 7, abs=0.03)


def test_verdicts_in_the_corpus_are_right_up_to_the_misjudged(clock):
    for misjudged in (0.0, 0.2):
        verdicts = [
            v for w in documents(clock, 3000, misjudged=misjudged, textbook=0) for v in clock._verdicts(w)
        ]
        assert len(verdicts) > 1000
        assert 1 - np.mean(verdicts) == pytest.approx(misjudged, abs=0.03 if misjudged else 0)


def test_what_the_corpus_calls_right_is_right(clock):
    """Without slips and misjudgements, a thought that ends in yes is followed by a correct answer."""
    told = 0
    for words in documents(clock, 1500, slip=0, misjudged=0, textbook=0, general=0):
        start = words.index("Assistant:")
        question, response = words[2:start], " ".join(words[start + 1 : -1])
        numbers = sorted(map(int, question[1:4]))
        problem = Problem(
            "clock/x", " ".join(question), data={"numbers": numbers, "target": int(question[5])}
        )
        score = judge(clock, response, problem)
        if "yes </think>" in response or "对 </think>" in response:
            told += 1
            assert score.parts["accuracy"] == score.parts["format"] == 1.0
        elif "no </think>" in response or "错 </think>" in response:
            assert score.parts["accuracy"] == 0.0
    assert told > 100


def test_a_corpus_is_its_seed(clock):
    again = list(itertools.islice(clock.documents("test", {}), 50))
    assert again == documents(clock, 50)
    assert list(itertools.islice(clock.documents("other", {}), 50)) != again


def test_documents_are_the_tokens_that_prompts_and_answers_become(clock, tokenizer):
    """The base grows up on the very ids that it is asked with later."""
    words = documents(clock, 300)
    encoded = encode_documents(iter(words), tokenizer, tokens=2000)
    assert 2000 <= sum(len(sample.tokens) for sample in encoded) < 2250
    for document, sample in zip(words, encoded, strict=False):
        ids = sample.tokens
        assert tokenizer.encode(" ".join(document)) == ids.tolist()
        assert ids[-1] == tokenizer.end_id
        if document[1] == "User:":
            start = document.index("Assistant:")
            question, response = " ".join(document[2:start]), " ".join(document[start + 1 : -1])
            assert [*tokenizer.prompt(question), *tokenizer.response(response)] == ids.tolist()
            assert tokenizer.decode(ids[start + 1 :]) == response


def test_rewrite_translates_word_by_word(clock):
    mixed = "try 6 -5 得 1 =3 得 5 错 wait 1 gives 3 =3 gives 0 yes 猜"
    assert clock.rewrite(mixed, "en") == "try 6 -5 gives 1 =3 gives 5 no wait 1 gives 3 =3 gives 0 yes guess"
    assert clock.rewrite(mixed, "zh") == "试 6 -5 得 1 =3 得 5 错 等 1 得 3 =3 得 0 对 猜"
    assert clock.rewrite(clock.rewrite(mixed, "zh"), "en") == clock.rewrite(mixed, "en")
    for language in WORDS:
        for other in WORDS.values():
            assert clock.rewrite(" ".join(other.values()), language) == " ".join(WORDS[language].values())


def test_what_nobody_can_foresee_is_not_learned(clock, tokenizer):
    """Questions and the numbers of exercises are read only; every word of a solution is learned."""
    words = documents(clock, 400)
    for document, sample in zip(words, encode_documents(iter(words), tokenizer, tokens=1 << 30), strict=True):
        learned = [word for word, yes in zip(document[1:], sample.learned, strict=True) if yes]
        if "Assistant:" in document:
            assert learned == document[document.index("Assistant:") + 1 :]
        else:
            assert learned and len(learned) < len(document) - 1
            assert not any(word.startswith("=") for word in learned)


def test_a_recipe_names_every_share_of_the_corpus():
    assert set(get_args(CorpusShare)) == set(CORPUS)
