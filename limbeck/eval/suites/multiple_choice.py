"""The suites of multiple choice: GPQA-diamond, MMLU-Pro, C-Eval."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from .extraction import INVALID, exact_match, find_choice, find_letter, find_match
from .mathematics import LIGHTEVAL, LM_EVAL, greedy, reasoning
from .suite import (
    LETTERS,
    Item,
    Metric,
    Prompt,
    Protocol,
    Row,
    Shots,
    Source,
    Suite,
    after_thought,
)

SUBJECTS = Path(__file__).with_name("c_eval_subjects.yaml")  # C-Eval's own names in Chinese
SIMPLE_EVALS = Source(
    "simple-evals, gpqa_eval.py and common.py, which the R1 report names (arXiv 2501.12948, section 3)",
    "https://github.com/openai/simple-evals",
    "0ac027d",
)
_INSTRUCTION = (
    "Answer the following multiple choice question. The last line of your response should be of the "
    "following format: 'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by "
    "step before answering."
)
_SHUFFLED = "its own order of the options is not seeded; here it is drawn with the seed 0"


def _choice(name: str, answer: Callable[[Item, str], str | None], extraction: str) -> Metric:
    """Return the metric that compares the letter of a response with the right one."""
    return Metric(name, lambda item, text: (answer(item, text) == item.gold,), extraction, answer=answer)


def _found(match: str) -> str | None:
    return None if match == INVALID else match


def _first_answer(letters: str) -> Metric:
    pattern = rf"(?i)Answer[ \t]*:[ \t]*\$?([{letters}])\$?"

    def answer(item: Item, text: str) -> str | None:
        return _found(find_match(pattern, after_thought(text)))

    return _choice("accuracy", answer, "after `</think>`; the letter after the first `Answer:`")


def _letter(letters: str) -> Metric:
    def answer(item: Item, text: str) -> str | None:
        return find_letter(after_thought(text), letters or item.letters) or None

    return _choice(
        "extractive_match",
        answer,
        "after `</think>`; the last letter after `final answer is`, else after `answer:`, after `answer`, at "
        "the beginning of the text, of a line, as a word, anywhere",
    )


# ---------------------------------------------------------------- GPQA


def _read_gpqa(rows: Sequence[Row], protocol: str) -> list[Item]:
    rng = random.Random(0)
    return [_gpqa_item(i, row, protocol, rng) for i, row in enumerate(rows)]


def _gpqa_item(number: int, row: Row, protocol: str, rng: random.Random) -> Item:
    """Return one question with its options in the protocol's order."""
    right = row["Correct Answer"]
    wrong = [row[f"Incorrect Answer {k}"] for k in (1, 2, 3)]
    question = row["Question"]
    if protocol == "deepseek":
        choices = [right, *wrong]
        choices = [choices[k] for k in rng.sample(range(4), 4)]
    elif protocol == "lighteval":
        choices = wrong
        choices.insert(rng.randint(0, 3), right)
        question, right, choices = question.strip(), right.strip(), [choice.strip() for choice in choices]
    else:
        right, *choices = map(_clean_option, [right, *wrong, right])
        rng.shuffle(choices)
    gold = LETTERS[choices.index(right)]
    return Item(f"gpqa-diamond/{number}", question, gold, tuple(choices), row=row)


def _clean_option(text: str) -> str:
    """Return an option as lm-eval shows it."""
    return text.strip().replace(" [title]", ". ").replace("  ", " ")


def _gpqa_strict(item: Item, text: str) -> tuple[bool]:
    answer = find_match(r"(?<=The answer is )(.*)(?=.)", text)
    return (exact_match(f"({item.gold})", answer, punctuation=True),)


def _gpqa_flexible(item: Item, text: str) -> tuple[bool]:
    answer = find_choice(r"(\([A-Z]\))", text, item.choices)
    return (exact_match(f"({item.gold})", answer, punctuation=True),)


_GPQA_LM_EVAL = "What is the correct answer to this question:{question}\nChoices:\n{choices}\n"
GPQA_DIAMOND = Suite(
    "gpqa-diamond",
    "GPQA-diamond",
    Source("GPQA: A Graduate-Level Google-Proof Q&A Benchmark", "https://arxiv.org/abs/2311.12022", "2023"),
    "https://huggingface.co/datasets/Idavidrein/gpqa (gated; gpqa_diamond.csv)",
    {"test": ("*gpqa_diamond*", "*diamond*")},
    ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    198,
    _read_gpqa,
    (
        Protocol(
            "deepseek",
            SIMPLE_EVALS,
            Prompt(_INSTRUCTION + "\n\n{question}\n\n{choices}"),
            (_first_answer("A-D"),),
            reasoning(8),
            note="eight samples as in open-r1's reproduction",
        ),
        Protocol(
            "lm-eval",
            Source(
                "lm-evaluation-harness 0.4.13, gpqa_diamond_zeroshot",
                f"{LM_EVAL}/gpqa/zeroshot/_gpqa_zeroshot_yaml",
                "2.2",
            ),
            Prompt(_GPQA_LM_EVAL + "Answer:", "({letter}) {choice}", chat=False),
            options=("(A)", "(B)", "(C)", "(D)"),
        ),
        Protocol(
            "lm-eval-cot",
            Source(
                "lm-evaluation-harness 0.4.13, gpqa_diamond_cot_zeroshot",
                f"{LM_EVAL}/gpqa/cot_zeroshot/_gpqa_cot_zeroshot_yaml",
                "2.2",
            ),
            Prompt(_GPQA_LM_EVAL + "Let's think step by step: ", "({letter}) {choice}", chat=False),
            (
                Metric("strict-match", _gpqa_strict, "what follows the first `The answer is `"),
                Metric(
                    "flexible-extract",
                    _gpqa_flexible,
                    "the last letter in brackets, else the last option that is named, else the letter after "
                    "a colon",
                ),
            ),
            greedy(256, "</s>"),
        ),
        Protocol(
            "lighteval",
            Source("lighteval 0.13.0, gpqa:diamond", f"{LIGHTEVAL}/gpqa.py", "1"),
            Prompt(_INSTRUCTION + "\n\n{question}\n\n{choices}"),
            (_letter(""),),
            greedy(32768),
            note=_SHUFFLED,
        ),
    ),
)

# ---------------------------------------------------------------- MMLU-Pro


def _read_mmlu_pro(rows: Sequence[Row], protocol: str) -> list[Item]:
    clean = str.strip if protocol == "lm-eval" else str
    items = []
    for i, row in enumerate(rows):
        choices = tuple(clean(option) for option in row["options"][:10])
        items.append(Item(f"mmlu-pro/{i}", row["question"], row["answer"], choices, row["category"], row))
    return items


def _worked_choice(item: Item) -> str:
    return item.row["cot_content"].replace("A: Let's think step by step. ", "")


def _custom_extract(item: Item, text: str) -> tuple[bool]:
    answer = find_match(r"answer is \(?([ABCDEFGHIJ])\)?", text)
    return (exact_match(item.gold, answer, punctuation=True),)


MMLU_PRO = Suite(
    "mmlu-pro",
    "MMLU-Pro",
    Source("MMLU-Pro: A More Robust and Challenging Benchmark", "https://arxiv.org/abs/2406.01574", "2024"),
    "https://huggingface.co/datasets/TIGER-Lab/MMLU-Pro",
    {"test": ("*test*",), "validation": ("*validation*",)},
    ("question", "options", "answer", "category"),
    12032,
    _read_mmlu_pro,
    (
        Protocol(
            "deepseek",
            SIMPLE_EVALS,
            Prompt(_INSTRUCTION + "\n\n{question}\n\n{choices}"),
            (_first_answer("A-J"),),
            reasoning(1),
            note="R1's report changes the benchmark's prompt to zero-shot and does not print it; this is the "
            "template of its other multiple choice",
        ),
        Protocol(
            "lm-eval",
            Source("lm-evaluation-harness 0.4.13, mmlu_pro", f"{LM_EVAL}/mmlu_pro/_mmlu_pro.yaml", "3.1"),
            Prompt(
                "Question:\n{question}\nOptions:\n{choices}\nAnswer: Let's think step by step.",
                "{letter}. {choice}",
                chat=False,
                description="The following are multiple choice questions (with answers) about {category}. "
                'Think step by step and then finish your answer with "the answer is (X)" where X is the '
                "correct letter choice.\n",
                shots=Shots(5, "validation", "first"),
                answer=_worked_choice,
            ),
            (Metric("custom-extract", _custom_extract, "the letter after the first `answer is`"),),
            greedy(2048, "Question:"),
        ),
        Protocol(
            "lighteval",
            Source("lighteval 0.13.0, mmlu_pro", f"{LIGHTEVAL}/mmlu_pro.py", "0"),
            Prompt(
                _INSTRUCTION.replace("{letters}", "ABCD") + "\n\n{question}\n\n{choices}\n\nAnswer:",
                "{letter}: {choice}",
            ),
            (_letter(LETTERS),),
            greedy(32768),
            note="its prompt names the letters ABCD whatever the number of options",
        ),
    ),
)

# ---------------------------------------------------------------- C-Eval


def _read_c_eval(rows: Sequence[Row], _: str) -> list[Item]:
    names = yaml.safe_load(SUBJECTS.read_text(encoding="utf-8"))
    items = []
    for i, row in enumerate(rows):
        path = Path(row["_file"])
        subject = re.sub(r"[_-]?(val|dev|test)\b.*|-0.*", "", path.stem) or path.parent.name
        choices = tuple(str(row[letter]) for letter in "ABCD")
        category = names.get(subject, subject)
        items.append(
            Item(f"c-eval/{subject}/{i}", row["question"].strip(), row["answer"], choices, category, row)
        )
    return items


def _chinese_answer(item: Item, text: str) -> str | None:
    return _found(find_match(r"(?i)答案\s*:\s*[\W]*([A-D])[\W]*", after_thought(text)))


C_EVAL = Suite(
    "c-eval",
    "C-Eval (validation)",
    Source(
        "C-Eval: A Multi-Level Multi-Discipline Chinese Evaluation Suite",
        "https://arxiv.org/abs/2305.08322",
        "2023",
    ),
    "https://huggingface.co/datasets/ceval/ceval-exam",
    {"test": ("*val*",), "dev": ("*dev*",)},
    ("question", "A", "B", "C", "D", "answer"),
    1346,
    _read_c_eval,
    (
        Protocol(
            "deepseek",
            Source(
                "OpenCompass, prompt and extraction of its zero-shot CoT for Chinese multiple choice "
                "(cmmlu_0shot_cot_gen)",
                "https://github.com/open-compass/opencompass",
                "2025",
            ),
            Prompt(
                "请回答以下关于{category}的单项选择题, 你回答的最后一行**必须**是以下格式 '答案: $选项' "
                "(不带引号), 其中选项是ABCD之一. 请在回答之前一步步思考.\n\n{question}\n\n{choices}"
            ),
            (_choice("accuracy", _chinese_answer, "after `</think>`; the letter after the first `答案:`"),),
            reasoning(1),
            note="R1's report changes the benchmark's prompt to zero-shot and does not print it; the answers "
            "of the test split are not published, so the validation split is asked",
        ),
        Protocol(
            "lm-eval",
            Source(
                "lm-evaluation-harness 0.4.13, ceval-valid", f"{LM_EVAL}/ceval/_default_ceval_yaml", "2.0"
            ),
            Prompt(
                "{question}\n{choices}\n答案：",
                "{letter}. {choice}",
                chat=False,
                description="以下是中国关于{category}的单项选择题，请选出其中的正确答案。\n\n",
            ),
        ),
    ),
)
