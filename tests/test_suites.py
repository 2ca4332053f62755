"""Named benchmarks: their files, prompts, extraction, verdicts, log-likelihoods and results."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import sys
import typing
from pathlib import Path

import checkpoints
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from bench import eval_cases
from limbeck.config.load import load
from limbeck.config.parts import ProtocolName, SuiteName, SuiteOptions
from limbeck.config.recipe import Evaluate
from limbeck.engine.rollout import Engine
from limbeck.eval.published import published_scores
from limbeck.eval.suites import measure
from limbeck.eval.suites.catalogue import CODE, SUITES, find_protocol, find_suite
from limbeck.eval.suites.extraction import (
    INVALID,
    between_dollars,
    exact_match,
    find_choice,
    find_letter,
    find_match,
    keep_last_box,
    last_box,
)
from limbeck.eval.suites.instruction_checks import follows, loosened, missing_package
from limbeck.eval.suites.matching import MathVerify, is_equivalent
from limbeck.eval.suites.prompts import TextTokenizer
from limbeck.eval.suites.reading import read_rows
from limbeck.eval.suites.suite import Item, fill
from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.kv_cache import Packed
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.job import Job
from limbeck.pipeline.stages import evaluate as stage
from limbeck.pipeline.store import Artifact, Store
from limbeck.report.suite_table import score_table
from limbeck.text.tokenizer import Tokenizer
from limbeck.types import LimbeckError, Resumable

SUMS = [{"question": f"{a} and {a}?", "answer": f"Double it.\n#### {2 * a}"} for a in range(9)]
GPQA = {
    "Question": "Which?",
    "Correct Answer": "four",
    "Incorrect Answer 1": "one",
    "Incorrect Answer 2": "two",
}
GPQA |= {"Incorrect Answer 3": "three"}


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def ask(folder: Path, name: str = "gsm8k", **options) -> measure.SuiteTask:
    return measure.open_suite(name, SuiteOptions(data=str(folder), **options))


@pytest.fixture
def sums(tmp_path) -> Path:
    write(tmp_path / "gsm8k/test.jsonl", SUMS[:3])
    write(tmp_path / "gsm8k/train.jsonl", SUMS[3:])
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny decoder whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("model")
    made = checkpoints.tokenizer()
    checkpoints.save_tokenizer(folder, made)
    tokenizer = Tokenizer.from_directory(folder)
    sizes = ModelConfig("llama", tokenizer.size, 16, 1, 2, 1, 8, 32, max_positions=1024)
    weights.save(Decoder(sizes).initialize(0), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return Engine(weights.load(model, torch.float32), Tokenizer.from_directory(model), 4)


# ---------------------------------------------------------------- declarations and files


def test_recipes_name_the_suites_and_protocols_that_there_are():
    assert set(typing.get_args(SuiteName)) == set(SUITES)
    protocols = {protocol.name for suite in SUITES.values() for protocol in suite.protocols}
    assert set(typing.get_args(ProtocolName)) == protocols
    for suite in SUITES.values():
        assert suite.home.startswith("https://") and suite.paper.url.startswith("https://")
        for protocol in suite.protocols:
            assert protocol.source.url.startswith("https://")
            assert (protocol.sampling is None) == (not protocol.metrics)
            assert all(metric.extraction for metric in protocol.metrics)


@pytest.mark.parametrize("name", CODE)
def test_suites_of_programs_are_refused(name):
    with pytest.raises(LimbeckError, match=f"{name}.*programs"):
        find_suite(name)


def test_an_unknown_suite_or_protocol_is_named_with_its_choices():
    with pytest.raises(LimbeckError, match="no such suite; choose gsm8k"):
        find_suite("gsm9k")
    with pytest.raises(LimbeckError, match="cmath is measured as deepseek"):
        find_protocol(find_suite("cmath"), "lm-eval")


def test_rows_are_the_same_from_jsonl_and_parquet(sums, tmp_path):
    (tmp_path / "other").mkdir()
    table = pyarrow.Table.from_pylist(SUMS[:3])
    pyarrow.parquet.write_table(table, tmp_path / "other/test-00000-of-00001.parquet")
    both = [read_rows(SUITES["gsm8k"], folder) for folder in (sums, tmp_path / "other")]
    for rows in both:
        for row in rows:
            assert Path(row.pop("_file")).exists()
    assert both[0] == both[1] == SUMS[:3]


def test_columns_are_found_whatever_their_case(tmp_path):
    write(tmp_path / "aime_2024.jsonl", [{"ID": "1", "Problem": "Find it.", "Answer": 7}])
    (item,) = ask(tmp_path, "aime-2024").items
    assert (item.question, item.gold) == ("Find it.", "7")


def test_a_csv_with_quotes_and_lines_is_read(tmp_path):
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(GPQA))
        writer.writeheader()
        writer.writerow({**GPQA, "Question": 'Which "one",\nof these?'})
    (item,) = ask(tmp_path, "gpqa-diamond").items
    assert item.question == 'Which "one",\nof these?'
    assert item.choices["ABCD".index(item.gold)] == "four"


def test_errors_name_file_field_and_where_it_is_published(sums, tmp_path):
    with pytest.raises(LimbeckError, match=r"no file \*test\* of MATH-500; it is published at https://"):
        ask(tmp_path / "gsm8k" / "nothing", "math-500")
    write(tmp_path / "bad/test.jsonl", [SUMS[0], {"question": "And?"}])
    with pytest.raises(LimbeckError, match=r"test.jsonl, row 2: no field answer.*openai/gsm8k.*question"):
        ask(tmp_path / "bad")
    with pytest.raises(LimbeckError, match="no file .*train.* of GSM8K"):
        write(tmp_path / "alone/test.jsonl", SUMS)
        ask(tmp_path / "alone", protocol="lm-eval")


# ---------------------------------------------------------------- prompts


def test_placeholders_in_a_value_are_not_filled():
    assert (
        fill(r"{question} \boxed{} {choices}", question="{choices}", choices="A") == r"{choices} \boxed{} A"
    )


def test_lm_eval_draws_five_examples_with_its_own_seed(sums):
    """The examples that lm-eval 0.4.13 shows with these files."""
    first, second, _ = ask(sums, protocol="lm-eval").prompts
    asked = [line.removeprefix("Question: ")[0] for line in first.splitlines() if line.startswith("Question")]
    assert asked == ["6", "3", "7", "8", "5", "0"]
    assert first.endswith("#### 10\n\nQuestion: 0 and 0?\nAnswer:")
    assert first.split("\n\n")[:-1] != second.split("\n\n")[:-1]


def test_deepseek_puts_the_question_alone(sums):
    assert ask(sums).prompts[0] == (
        "0 and 0?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


def test_examples_are_of_the_same_subject(tmp_path):
    rows = [
        {"question": f"{subject} {i}?", "options": ["x", "y "], "answer": "B", "category": subject,
         "cot_content": f"A: Let's think step by step. It is {i}."}
        for subject in ("law", "math") for i in range(6)
    ]  # fmt: skip
    write(tmp_path / "test.jsonl", rows[6:7])
    write(tmp_path / "validation.jsonl", rows)
    (prompt,) = ask(tmp_path, "mmlu-pro", protocol="lm-eval").prompts
    assert prompt.startswith("The following are multiple choice questions (with answers) about math.")
    assert "law" not in prompt and prompt.count("Question:\n") == 6
    assert "Options:\nA. x\nB. y\nAnswer: Let's think step by step. It is 4.\n\nQuestion:" in prompt


# ---------------------------------------------------------------- extraction and verdicts


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{3}", "3"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1", None),
        ("none", None),
        (r"is $\boxed 7$ now", "7"),
        (r"\boxed7 {x}", None),
    ],
)
def test_the_last_box(text, found):
    assert last_box(text) == found


def test_only_the_last_box_is_kept():
    assert keep_last_box(r"\boxed{1}. No, \boxed{2}") == r"{1}. No, \boxed{2}"
    assert keep_last_box(r"\boxed{9} so \boxed{1}, \boxed{2}") == r"{9} so \boxed{1}, \boxed{2}"
    assert keep_last_box(r"$\boxed{1}$ and $\boxed{2}$") == r"$\boxed{1}$ and $\boxed{2}$"
    assert keep_last_box(r"\boxed{1 and \boxed{2}") == r"{1 and \boxed{2}"
    assert keep_last_box("none") == "none"


def test_filters_of_lm_eval():
    assert find_match(r"#### (\-?[0-9\.\,]+)", "#### 1,234 and #### 5") == "1,234"
    assert find_match(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "7 then $12.", -1) == "$12."
    assert find_match("x", "y") == INVALID
    assert between_dollars("a $b$ c $d$") == "b$ c $d" and between_dollars("a $b") == "a $b"
    assert find_choice(r"(\([A-Z]\))", "(A) no, (C)", ["x", "y", "z"]) == "(C)"
    assert find_choice(r"(\([A-Z]\))", "It is Iron oxide!", ["iron", "iron oxide"]) == "(B)"
    assert find_choice(r"(\([A-Z]\))", "Answer: B", ["x1", "y1"]) == "(B)"
    assert exact_match("1,234.", "$1234", [",", r"\$", r"\.$"]) and not exact_match("12", "1.2")
    assert exact_match("(A)", "a", punctuation=True)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("A or B? The final answer is C. But D", "C"),
        ("**D**", "D"),
        ("no letter here", ""),
        ("Answer: maybe A\nAnswer: B", "B"),
    ],
)
def test_the_letter_of_a_response(text, letter):
    assert find_letter(text, "ABCD") == letter


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{3}{4}", "3/4", True),
        (r"\frac{3}{4}", r"\dfrac34", True),
        (r"2\sqrt{3}", r"2\sqrt3", True),
        (r"90", r"90^\circ", True),
        ("5", r"x = 5\text{ cm}", True),
        ("12", r"12\%", True),
        ("0.25", ".25", True),
        ("2", "3", False),
        ("a/b", "a / b", False),
        ("(1,2)", "(1, 2)", True),
    ],
)
def test_the_normal_form_of_hendrycks(gold, answer, same):
    assert is_equivalent(gold, answer) is same


def test_the_verdicts_on_aime_are_those_of_lm_eval():
    theirs = pytest.importorskip("lm_eval.tasks.aime.utils").process_results
    judge = find_protocol(SUITES["aime-2024"], "lm-eval").metrics[0].judge
    for row, text in [*eval_cases.aime()][::5] + [*eval_cases.math()][::5]:
        item = Item("x", row["problem"], row["answer"], row=row)
        assert judge(item, text)[0] == bool(theirs(row, [text])["exact_match"]), (row["answer"], text)


@pytest.mark.parametrize(
    ("gold", "text", "same"),
    [
        ("$72$", r"It is \boxed{72}.", True),
        ("$72$", "The answer is 72.0", True),
        ("$72$", "Not 72 but 73", False),
        (r"$\frac{1}{2}$", "The answer is 1/2", True),
        ("$8$", "__import__('os').system('true')", False),
        ("$1.234567$", "1.23456749", True),
        ("$64$", "5 * 064 = 5 * 064", True),  # 064 is no number to Python, so the last one is the answer
        ("$320$", "5 * 64", True),
    ],
)
def test_math_verify_on_whole_responses(gold, text, same):
    assert MathVerify().is_correct(gold, text) is same


def verdicts(task: measure.SuiteTask, *texts: str) -> list[bool]:
    metric = task.protocol.metrics[0]
    return [metric.judge(task.items[0], text)[0] for text in texts]


def test_verdicts_of_gsm8k(sums):
    write(sums / "gsm8k/test.jsonl", [{"question": "?", "answer": "#### 1,234"}])
    strict = ask(sums, protocol="lm-eval")
    assert verdicts(strict, "#### 1234", "#### $1234", "It is 1234") == [True, False, False]
    deepseek = ask(sums)
    assert verdicts(deepseek, r"<think>9</think>\boxed{1234}", r"<think>\boxed{1234}</think>9") == [
        True,
        False,
    ]


def test_order_of_options_and_verdicts_of_gpqa(tmp_path):
    write(tmp_path / "gpqa_diamond.jsonl", [GPQA] * 4)
    golds = {}
    for protocol in ("deepseek", "lm-eval", "lighteval"):
        items = ask(tmp_path, "gpqa-diamond", protocol=protocol).items
        golds[protocol] = "".join(item.gold for item in items)
        assert all(sorted(item.choices) == ["four", "one", "three", "two"] for item in items)
        assert all(item.choices["ABCD".index(item.gold)] == "four" for item in items)
    assert len(set(golds["deepseek"])) > 1 and golds["deepseek"] != golds["lm-eval"]
    task = ask(tmp_path, "gpqa-diamond")
    gold = task.items[0].gold
    assert verdicts(task, f"Answer: {gold}", f"answer:${gold}$", "Answer: none") == [True, True, False]
    cot = ask(tmp_path, "gpqa-diamond", protocol="lm-eval-cot")
    gold = cot.items[0].gold
    assert verdicts(cot, f"The answer is ({gold}).", f"({gold})") == [True, False]


# ---------------------------------------------------------------- instructions


@pytest.mark.parametrize(
    ("instruction", "arguments", "right", "wrong"),
    [
        ("keywords:existence", {"keywords": ["boat", "river"]}, "A River, a boat", "a river"),
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "A a", "a"),
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a", "a a"),
        ("keywords:forbidden_words", {"forbidden_words": ["boat"]}, "boats", "a Boat!"),
        ("keywords:letter_frequency", {"letter": "R", "let_frequency": 2, "let_relation": "at least"},
         "Rr", "r"),
        ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"},
         "?", "!"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "less than"},
         "one two", "one two-three"),
        ("length_constraints:nth_paragraph_first_word",
         {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Two"}, "a\n\n'Two', b", "a\n\nb two"),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a b]"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\nP. S. b", "a PS b"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "p.p.s b", "p.s. b"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "** a\n* b"),
        ("detectable_format:constrained_response", {}, "Well: My answer is no.", "no"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", "*a* **"),
        ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2},
         "Day 1\na\nDay 2\nb", "Day one, Day 2"),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("detectable_format:title", {}, "<<a b>>", "<< >>"),
        ("combination:two_responses", {}, "a******b", "a******a"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Do it."}, " do it. Done", "Done. Do it."),
        ("startend:end_checker", {"end_phrase": "The end."}, 'So: the end."', "The end. Or"),
        ("startend:quotation", {}, ' "a" ', '"'),
        ("punctuation:no_comma", {}, "a; b", "a, b"),
    ],
)  # fmt: skip
def test_instructions(instruction, arguments, right, wrong):
    assert follows(instruction, arguments, right) and not follows(instruction, arguments, wrong)
    assert not follows(instruction, arguments, "  ")


def test_instructions_about_language():
    pytest.importorskip("langdetect")
    german = "Der Fluss ist sehr breit und das Boot ist klein."
    assert follows("language:response_language", {"language": "de"}, german)
    assert not follows("language:response_language", {"language": "fr"}, german)
    english = "The river is very wide and the boat is small."
    assert follows("change_case:english_capital", {}, english.upper())
    assert not follows("change_case:english_capital", {}, english)
    assert follows("change_case:english_lowercase", {}, english.lower())


def test_the_loosened_forms():
    assert loosened("Sure!\n*a*\nBye") == [
        "Sure!\n*a*\nBye", "*a*\nBye", "Sure!\n*a*", "*a*", "Sure!\na\nBye", "a\nBye", "Sure!\na", "a"
    ]  # fmt: skip


def instructed(folder: Path, *pairs: tuple[str, dict]) -> measure.SuiteTask:
    row = {
        "key": 1,
        "prompt": "Write.",
        "instruction_id_list": [i for i, _ in pairs],
        "kwargs": [k for _, k in pairs],
    }
    write(folder / "ifeval.jsonl", [row])
    return ask(folder, "ifeval")


def test_verdicts_of_ifeval(tmp_path):
    """Parquet has every argument in every row, most of them none."""
    empty = {"num_words": None, "relation": None}
    words = {"num_words": 3, "relation": "less than"}
    task = instructed(tmp_path, ("punctuation:no_comma", empty), ("length_constraints:number_words", words))
    found = measure.judge(
        task.protocol.metrics, task.items[0], ["<think>a, b</think>\none, two", "Sure,\none two"]
    )
    assert found == {
        "prompt_level_strict_acc": [[False], [False]],
        "inst_level_strict_acc": [[False, True], [False, False]],
        "prompt_level_loose_acc": [[False], [True]],
        "inst_level_loose_acc": [[False, True], [True, True]],
    }


def test_an_instruction_that_cannot_be_checked_is_refused(tmp_path, monkeypatch):
    with pytest.raises(LimbeckError, match="key 1: there is no check of keywords:rhyme"):
        instructed(tmp_path, ("keywords:rhyme", {}))
    with pytest.raises(LimbeckError, match="number_words takes num_words, relation in kwargs"):
        instructed(tmp_path, ("length_constraints:number_words", {"num_words": 3}))
    missing_package.cache_clear()
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(LimbeckError, match="response_language needs the package langdetect: `pip install"):
        instructed(tmp_path, ("language:response_language", {"language": "de"}))
    missing_package.cache_clear()


# ---------------------------------------------------------------- measurement


def test_responses_end_before_a_stop_text():
    assert measure.cut_off("12\n\nQuestion: more", ("Question:", "</s>")) == "12\n\n"
    assert measure.cut_off("12", ("Question:",)) == "12"


def test_options_by_log_likelihood_and_per_character():
    item = Item("x", "?", "A", ("p", "q"))
    assert measure.choose(item, ["a", "bbbb"], [-3.0, -4.0]) == {"acc": True, "acc_norm": False}
    assert measure.choose(item, ["a", "b"], [-1.0, -1.0]) == {
        "acc": True,
        "acc_norm": True,
    }  # the first of equals


def test_a_pair_is_encoded_as_one_text(engine):
    tokenizer = TextTokenizer(engine.tokenizer)
    sample = measure.encode_pair(tokenizer, "Answer: ", "A")
    assert tokenizer.decode(sample.tokens[sample.start :]) == " A"


def test_log_likelihoods_are_those_of_the_decoder(tmp_path, engine):
    rows = [{"question": f"{i}?", "A": "x", "B": "yy", "C": "zz", "D": "w", "answer": "B"} for i in range(3)]
    write(tmp_path / "law_val.jsonl", rows)
    task = ask(tmp_path, "c-eval", protocol="lm-eval")
    assert task.prompts[0].startswith("以下是中国关于法学的单项选择题")
    rows = measure.measure(task, slice(None), measure.engines_for([task], engine)["c-eval"], 0)
    tokenizer = TextTokenizer(engine.tokenizer)
    for prompt, row in zip(task.prompts, rows, strict=True):
        for letter, score in zip("ABCD", row["logprobs"], strict=True):
            tokens = torch.tensor(tokenizer.encode(f"{prompt} {letter}"))
            logits = engine.model.head(engine.model(tokens, Packed([len(tokens)]))).log_softmax(-1)
            start = len(tokenizer.encode(prompt))
            expected = logits[np.arange(start - 1, len(tokens) - 1), tokens[start:]].sum()
            assert score == pytest.approx(float(expected), rel=1e-5)
        assert row["verdicts"]["acc"] == [[int(np.argmax(row["logprobs"])) == 1]]


def test_texts_are_continued_and_chats_are_templated(sums, engine):
    for protocol, chat in (("deepseek", True), ("lm-eval", False)):
        task = ask(sums, protocol=protocol)
        prompt = measure.engines_for([task], engine)["gsm8k"].tokenizer.prompt(task.prompts[0])
        text = engine.tokenizer.render([{"role": "user", "content": task.prompts[0]}])
        assert prompt.tolist() == engine.tokenizer.encode(text if chat else task.prompts[0])


def test_a_result_counts_items_tokens_and_truncated_responses(sums, engine):
    task = ask(sums, items=2, samples=3, max_new_tokens=5)
    rows = measure.measure(task, slice(None), engine, "seed")
    assert rows == measure.measure(task, slice(None), engine, "seed")
    result = measure.combine(task, rows)
    assert (result["items"], result["responses"]) == (2, 6)
    assert result["tokens"] == sum(sum(row["tokens"]) for row in rows) <= 30
    assert result["metrics"]["math_verify"]["n"] == 6 and result["metrics"]["math_verify"]["problems"] == 2
    assert result["changes"] == [
        "3 items in the files, 1319 as published", "the first 2 items only", "samples 3, 1 as published",
        "max_new_tokens 5, 32768 as published",
    ]  # fmt: skip


def test_parts_of_a_suite_add_up(sums, engine, monkeypatch):
    task = ask(sums, max_new_tokens=4)
    whole = measure.measure(task, slice(None), engine, 0)
    monkeypatch.setattr(measure, "ITEMS_AT_ONCE", 2)
    parts = [measure.measure(task, part, engine, 0) for part in task.chunks]
    assert [len(part) for part in parts] == [2, 1]
    assert parts[0] + parts[1] == whole


# ---------------------------------------------------------------- the majority vote


def test_the_vote_of_several_boxes():
    """Three answers are 7 (one of them in another spelling), two are 8, one has no box; one vote, right or
    wrong; the first answer wins a tie."""
    metric = SUITES["aime-2024"].protocols[0].metrics[0]
    texts = [
        r"\boxed{8}",
        r"<think>\boxed{8}</think>\boxed{7}",
        r"\boxed{07}",
        "8",
        r"\boxed{8}",
        r"\boxed{ 7}",
    ]
    verdicts = [[text.endswith(("7}",))] for text in texts]

    def voted(gold: str, count: int) -> dict:
        judged = {metric.name: [[verdict == (gold == "7")] for (verdict,) in verdicts[:count]]}
        return measure.vote(metric, Item("aime-2024/0", "ask", gold), texts[:count], judged)

    assert voted("7", 6) == {"cons@6": [[True]]} and voted("8", 6) == {"cons@6": [[False]]}
    assert voted("8", 2) == {"cons@2": [[True]]}
    assert voted("7", 1) == {}
    nothing = measure.vote(
        metric, Item("aime-2024/0", "ask", "7"), ["7", "7"], {metric.name: [[True], [True]]}
    )
    assert nothing == {"cons@2": [[False]]}, "a response without a box has no vote"


def test_letters_are_voted_on():
    metric = SUITES["gpqa-diamond"].protocols[0].metrics[0]
    item = Item("gpqa-diamond/0", "ask", "B", ("w", "x", "y", "z"))
    texts = ["Answer: A", "Answer: B", "Answer: B", "no"]
    verdicts = measure.judge((metric,), item, texts)
    assert measure.vote(metric, item, texts, verdicts) == {"cons@4": [[True]]}


# ---------------------------------------------------------------- the stage


def evaluate(model: Path, data: Path, folder: Path, stopping=lambda: False) -> dict[str, bytes]:
    """Run an `evaluate` stage on GSM8K; returns the bytes of what it wrote."""
    folder.mkdir(exist_ok=True)
    (folder / "input").mkdir(exist_ok=True)
    if not (folder / "input/model").exists():
        (folder / "input/model").symlink_to(model)
    options = SuiteOptions(data=str(data), max_new_tokens=4, samples=2)
    settings = Evaluate(kind="evaluate", models=["m"], problems=[], suites={"gsm8k": options})
    out = folder / "out"
    out.mkdir(exist_ok=True)
    stage.run(Job("e", settings, "0/e", {"m": folder / "input"}, {}, out, stopping=stopping))
    return {name: (out / name).read_bytes() for name in ("evaluation.json", "suite_items.jsonl")}


def test_a_stage_that_was_stopped_goes_on_with_the_next_part(sums, model, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ITEMS_AT_ONCE", 1)
    whole = evaluate(model, sums, tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(Resumable):
            evaluate(model, sums, tmp_path / "parts", lambda: True)
    assert evaluate(model, sums, tmp_path / "parts") == whole
    result = json.loads(whole["evaluation.json"])["suites"]["gsm8k"]
    assert result["responses"] == 6 and "seconds" not in result


RECIPE = """
name: suites
problems: {{clock: {{source: miniature}}}}
stages:
  base: {{kind: load, path: model}}
  evaluation: {{kind: evaluate, models: [base], problems: [clock]{more}}}
"""


class Full(Store):
    """A store in which every stage has been carried out."""

    def find(self, kind: str, key: str) -> Artifact:
        return Artifact(self.root, {"kind": kind, "digest": key})


def test_a_recipe_needs_problems_beside_its_suites(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE.format(more="").replace("[clock]", "[]"))
    with pytest.raises(LimbeckError, match=r"stages.evaluation.problems is empty"):
        load(tmp_path / "r.yaml")


def test_the_key_covers_the_files_of_a_suite_and_not_their_folder(sums, model, tmp_path):
    (tmp_path / "model").symlink_to(model)

    def key(more: str) -> str | None:
        (tmp_path / "r.yaml").write_text(RECIPE.format(more=more))
        graph = Graph(load(tmp_path / "r.yaml"), Full(tmp_path / "store"), tmp_path)
        return graph.nodes["evaluation/base"].key

    plain = key("")
    first = key(", suites: {gsm8k: {data: gsm8k}}")
    shutil.copytree(sums / "gsm8k", tmp_path / "copy")
    assert len({plain, first, key(", suites: {gsm8k: {data: copy}}")}) == 2
    assert key(", suites: {gsm8k: {data: gsm8k, protocol: lm-eval}}") not in (plain, first)
    write(tmp_path / "copy/test.jsonl", SUMS[:2])
    assert key(", suites: {gsm8k: {data: copy}}") not in (plain, first)


# ---------------------------------------------------------------- published scores


def test_every_published_score_has_a_suite_and_a_source():
    scores = published_scores()
    assert len(scores) > 40
    for score in scores:
        assert score.suite in SUITES and 0 < score.score < 100
        assert score.metric in ("", "cons@64") and score.url.startswith("https://")
        assert all(value for name, value in dataclasses.asdict(score).items() if name != "metric")
    by = {(score.model, score.suite, score.metric, score.title[:11]): score.score for score in scores}
    assert by["DeepSeek-R1", "math-500", "", "DeepSeek-R1"] == 97.3
    assert by["R1-Distill-Qwen-1.5B", "aime-2024", "", "DeepSeek-R1"] == 28.9
    assert by["R1-Distill-Qwen-1.5B", "aime-2024", "cons@64", "DeepSeek-R1"] == 52.7


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_json(call, sums, model, tmp_path):
    arguments = ("eval", model, "--suite", "gsm8k", "--data", sums, "--as", "lm-eval", "--max-new-tokens", 4)
    said = call(*arguments, "--price", 2, "--out", tmp_path / "verdicts.jsonl")
    assert said.code == 0, said.err
    assert "gsm8k as lm-eval: lm-evaluation-harness 0.4.13, gsm8k (3.0)" in said.out
    assert "not as published: 3 items in the files, 1319 as published" in said.out
    assert "strict-match" in said.out and "flexible-extract" in said.out and "$0.00" in said.out
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [row["item"] for row in rows] == ["gsm8k/0", "gsm8k/1", "gsm8k/2"]
    result = json.loads(call(*arguments, "--json").out)["data"]["gsm8k"]
    assert result["metrics"]["strict-match"]["n"] == 3 and result["seconds"] > 0
    assert result["published"] == []


def test_one_table_has_the_model_among_published_ones(call, model, tmp_path):
    """The three suites of the R1 reproductions, on made-up files of their form, with two responses each."""
    write(tmp_path / "aime-2024/aime_2024.jsonl", [{"problem": "Find 7.", "answer": "7"}])
    write(tmp_path / "math-500/test.jsonl", [{"problem": "Find 7.", "solution": r"\boxed{7}", "answer": "7"}])
    write(tmp_path / "gpqa-diamond/gpqa_diamond.jsonl", [GPQA])
    names = ("math-500", "aime-2024", "gpqa-diamond")
    asked = [part for name in names for part in ("--suite", name)]
    command = ("eval", model, *asked, "--data", tmp_path, "--samples", 2, "--max-new-tokens", 4)
    told = json.loads(call(*command, "--json").out)["table"]
    assert told["columns"] == [column for name in names for column in (name, f"{name} cons@2")]
    mine, *others = told["rows"]
    assert (mine["model"], mine["measured"]) == (str(model), "as deepseek")
    assert mine["scores"]["math-500"]["n"] == 2 and mine["scores"]["math-500 cons@2"]["n"] == 1
    by = {(row["model"], row["measured"]): row["scores"] for row in others}
    assert by["DeepSeek-R1", "[1]"] == {"math-500": 97.3, "aime-2024": 79.8, "gpqa-diamond": 71.5}
    assert told["sources"][0].startswith("DeepSeek-R1, README, section 4")
    lines = call(*command, "--markdown").out.splitlines()
    assert lines[0].startswith("| model | measured | math-500 | math-500 cons@2 | aime-2024 |")
    assert lines[2].startswith(f"| {model} | as deepseek | **0.0** (0.0 to ")
    assert "| DeepSeek-R1 | [1] | 97.3 |  | 79.8 |  | 71.5 |  |" in lines
    said = call(*command).out
    assert "math-500 as deepseek" in said and "[1] DeepSeek-R1, README, section 4" in said
    assert re.search(r"^DeepSeek-R1 +\[1\] +97.3 +79.8 +71.5$", said, re.MULTILINE)


def test_a_majority_vote_has_a_column_with_published_votes():
    interval = {"mean": 0.5, "low": 0.3, "high": 0.7, "n": 64, "problems": 1}
    result = {"protocol": "deepseek", "metrics": {"math_verify": interval, "cons@64": interval}}
    table = score_table({"mine": {"aime-2024": result}})
    assert table.columns == (("aime-2024", ""), ("aime-2024", "cons@64"))
    by = {row.model: row.scores for row in table.rows}
    assert by["R1-Distill-Llama-70B"] == {("aime-2024", ""): 70.0, ("aime-2024", "cons@64"): 86.7}
    assert by["mine"]["aime-2024", "cons@64"].mean == 0.5 and table.rows[0].model == "mine"
    assert score_table({}).rows == ()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--suite", "humaneval"), "programs"),
        (("--suite", "gsm8k"), "--data .not given.: no such folder.*GSM8K.*https"),
        (("--suite", "cmath", "--as", "lm-eval"), "cmath is measured as deepseek"),
        ((), "either --problems or --suite"),
    ],
)
def test_mistakes_are_one_sentence(call, model, arguments, told):
    said = call("eval", model, *arguments)
    assert said.code == 2 and len(said.err.strip().splitlines()) == 1
    assert re.search(told, said.err)
