"""Rows in the published form of each suite and responses to them, made here: right and wrong answers in many
spellings, boxes, thoughts, letters, broken texts. No row is taken from a benchmark."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

Case = tuple[dict, str]  # a row, a response

EXPRESSIONS = (
    "42", "-7", "1234", "0.5", r"\frac{3}{4}", r"\dfrac{1}{2}", r"\frac12", r"-\frac{7}{3}", r"2\sqrt{3}",
    r"\sqrt2", r"\sqrt{5}-1", "(1,2)", "[0,3)", r"(-\infty,2]", r"x^2+1", "3x-2", r"90^\circ", r"12\%",
    "1,000", "10,080", r"\pi", r"\frac{\pi}{6}", r"6\text{ cm}", r"\text{Tuesday}", r"5\pm\sqrt{2}",
    r"\{1,2,3\}", "2^{10}", "C", "1.25", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "3+4i",
    r"\binom{5}{2}", "y=2x+1", r"11\frac{1}{2}", "0", "-0.25",
)  # fmt: skip
SPELLINGS = (
    "{a}", "The answer is {a}.", "The answer is ${a}$.", "#### {a}", "So we get\n#### {a}", r"\boxed{{{a}}}",
    r"Hence $\boxed{{{a}}}$.", r"Therefore, the final answer is: $\boxed{{{a}}}$. I hope it is correct",
    "Final Answer: The final answer is ${a}$. I hope it is correct.", "ANSWER: {a}", "ANSWER: ${a}$",
    "**{a}**", "answer: **{a}**", "x = {a}", "$x = {a}$", "It costs ${a} in all.", "{a} apples",
    "That is {a}%.", r"\[{a}\]", "First 17, then 3.\nThe total is {a}", "The answer is {a}, not 99.",
    "The answer is 99. No: {a}.", r"\boxed{{99}} or rather \boxed{{{a}}}", r"\boxed{{{a}}} and \boxed{{99}}",
    r"\boxed{{{a}", r"\boxed {a}", "<think>\nPerhaps 99.\n</think>\n\nIt is {a}.",
    "<think>\nIt is {a}.\n</think>\n\nIt is 99.", "<think>never closed, but {a}", "#### {a}\n\n#### 99",
    "#### 99\n\n#### {a}", "#### ${a}.00", "####{a}", "", "I do not know.", "答案是 {a}。",
    "$10 + 20 = {a}$ dollars", "({a})", "{a}\n\n", "5 * {a} = 5 * {a}", "= {a}", "The final answer is {a}",
    "{a} {a} {a}", "let $a = 3$ and $b = 4$ so {a}", r"\fbox{{{a}}}",
)  # fmt: skip
LETTERED = (
    "{l}", "({l})", "Answer: {l}", "answer: {l}.", "The answer is {l}", "The answer is ({l}).",
    "the answer is ({l})", "**{l}**", "**Answer: {l}**", "ANSWER: {l}", "Answer: ${l}$", "Answer:{l}",
    "Final answer is: {l}. I hope it is", "The final answer is ({l})", "{c}", "I choose {c}",
    "It is {c}, so {l}.", "{l}. {c}", "A is wrong, B too; {l}", "Not (A), not (B), but ({l})",
    "<think>\nAnswer: A\n</think>\n\nAnswer: {l}", "Answer: {l}\n\nAnswer: A", "", "I am unsure.",
    "\n{l}) because", "Answer: none of these", "the correct option is {l}!", r"\boxed{{{l}}}",
    "Answer: option {l}", "answer is {l}{l}", "答案: {l}", "答案：{l}", "Let me think. The answer is {l}\nQ",
    ": {l}",
)  # fmt: skip


def spell(answers: list[str]) -> list[str]:
    """Every answer in every spelling."""
    return [spelling.format(a=answer) for answer in answers for spelling in SPELLINGS]


def gsm8k() -> Iterator[Case]:
    """Sums of two numbers: the right one, near ones, with commas and decimals."""
    rng = random.Random(0)
    for _ in range(24):
        a, b = rng.randint(2, 2000), rng.randint(2, 900)
        row = {
            "question": f"A shop has {a} pens and gets {b} more. How many has it?",
            "answer": f"It has {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n#### {a + b:,}"
            if a % 2
            else f"#### {a + b}",
        }
        for answer in (f"{a + b}", f"{a + b:,}", f"{a + b}.0", f"{a + b + 1}"):
            yield from ((row, text) for text in spell([answer]))


def math() -> Iterator[Case]:
    """Expressions: themselves, the next one in the list, other spellings."""
    for answer, other in zip(EXPRESSIONS, (*EXPRESSIONS[1:], EXPRESSIONS[0]), strict=True):
        row = {
            "problem": f"Which expression is meant by number {EXPRESSIONS.index(answer)}?",
            "solution": rf"It can only be $\boxed{{{answer}}}$.",
            "answer": answer,
        }
        changed = answer.replace(r"\frac", r"\dfrac").replace(",", ", ")
        yield from ((row, text) for text in spell([answer, other, changed]))


def aime() -> Iterator[Case]:
    """Whole numbers up to 999."""
    rng = random.Random(1)
    for _ in range(24):
        number = rng.randint(0, 999)
        row = {"problem": f"Find the number {number} again.", "answer": str(number)}
        yield from (
            (row, text) for text in spell([str(number), f"{number:03}", str(number + 1), f"{number}.0"])
        )


def _lettered(row: dict, letters: str, choices: list[str]) -> Iterator[Case]:
    for (letter, choice), text in itertools.product(zip(letters, choices, strict=True), LETTERED):
        yield row, text.format(l=letter, c=choice)


def gpqa() -> Iterator[Case]:
    """Questions with four options, one of which contains another."""
    for number in range(12):
        choices = [
            f"{number} joules",
            f"{number + 1} joules",
            f"{number} joules at rest",
            f"10^{number} [title] volts ",
        ]
        row = {"Question": f"Which quantity has the number {number}?", "Correct Answer": choices[number % 4]}
        wrong = [choice for choice in choices if choice != choices[number % 4]]
        row |= {f"Incorrect Answer {k + 1}": choice for k, choice in enumerate(wrong)}
        yield from _lettered(row, "ABCD", choices)


def mmlu_pro() -> Iterator[Case]:
    """Questions with three to ten options."""
    for number in range(8):
        options = [f"value {number * k}" for k in range(3 + number)]
        gold = number % len(options)
        row = {
            "question_id": number,
            "question": f"What is {number} times {gold}?",
            "options": options,
            "answer": "ABCDEFGHIJ"[gold],
            "answer_index": gold,
            "cot_content": "A: Let's think step by step. "
            f"It is {number * gold}. The answer is ({'ABCDEFGHIJ'[gold]}).",
            "category": "math",
            "src": "made",
        }
        yield from _lettered(row, "ABCDEFGHIJ"[: len(options)], options)


def c_eval() -> Iterator[Case]:
    """Questions with four options in Chinese; nothing is sampled."""
    for number in range(20):
        choices = {letter: f"{number + k}" for k, letter in enumerate("ABCD")}
        yield {"id": number, "question": f" {number}加一等于几？", **choices, "answer": "B"}, ""


INSTRUCTIONS = (
    ("keywords:existence", {"keywords": ["river", "boat"]}),
    ("keywords:frequency", {"keyword": "river", "frequency": 2, "relation": "at least"}),
    ("keywords:frequency", {"keyword": "river", "frequency": 2, "relation": "less than"}),
    ("keywords:forbidden_words", {"forbidden_words": ["boat", "mist"]}),
    ("keywords:letter_frequency", {"letter": "r", "let_frequency": 6, "let_relation": "less than"}),
    ("language:response_language", {"language": "de"}),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 12}),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Boat"}),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}),
    ("detectable_format:json_format", {}),
    ("detectable_format:title", {}),
    ("combination:two_responses", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write of the river."}),
    ("startend:end_checker", {"end_phrase": "Is there more?"}),
    ("startend:quotation", {}),
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
    ("punctuation:no_comma", {}),
)  # fmt: skip
PIECES = (
    "The river is wide.", "the river carries a boat and the boat carries us home again",
    "Write of the river.", "* one\n* two", "- one\n- two\n- three", "*high* and *low*",
    "**high** and **low**", "***", "******", "\n\n", "Boat, river", "'Boat' is here", "[name] and [place]",
    "P.S. more", "p. p. s. more", "<<Title>>", "<< >>", '{"a": 1}', '```json\n{"a": [1, 2]}\n```',
    "Section 1\nfirst\nSection 2\nsecond", "My answer is yes.", "Is there more?", '"',
    "THE RIVER IS WIDE AND THE BOAT IS SMALL", "Der Fluss ist breit und das Boot ist klein",
    "El río es ancho y el barco es pequeño", "河流很宽", "", " ", "1, 2, 3", "mist", "River river RIVER",
)  # fmt: skip


def ifeval() -> Iterator[Case]:
    """Every instruction that needs no further data, with pieces of text put together at random."""
    rng = random.Random(2)
    for number, (instruction, arguments) in enumerate(INSTRUCTIONS):
        other, others = INSTRUCTIONS[(number + 7) % len(INSTRUCTIONS)]
        row = {
            "key": number,
            "prompt": f"Write of the river ({number}).",
            "instruction_id_list": [instruction, other],
            "kwargs": [arguments, others],
        }
        for _ in range(120):
            pieces = rng.choices(PIECES, k=rng.randint(1, 4))
            yield row, rng.choice(["", " ", "\n", "\n\n"]).join(pieces)


CASES = {
    "gsm8k": gsm8k,
    "math-500": math,
    "aime-2024": aime,
    "gpqa-diamond": gpqa,
    "mmlu-pro": mmlu_pro,
    "c-eval": c_eval,
    "ifeval": ifeval,
}
