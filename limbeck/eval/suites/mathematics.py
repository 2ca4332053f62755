"""The suites of mathematics: GSM8K, MATH-500, AIME 2024 and 2025, CMATH."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from .extraction import between_dollars, exact_match, find_match, last_box
from .matching import MathVerify, boxed_answer, is_equivalent
from .suite import (
    Item,
    Metric,
    Prompt,
    Protocol,
    Row,
    Shots,
    Source,
    Suite,
    SuiteSampling,
    after_thought,
)

LM_EVAL = "https://github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/lm_eval/tasks"
LIGHTEVAL = "https://github.com/huggingface/lighteval/blob/v0.13.0/src/lighteval/tasks/tasks"
R1_README = Source("DeepSeek-R1, README, sections 4 and 6", "https://github.com/deepseek-ai/DeepSeek-R1")
OPEN_R1 = "the verdict is open-r1's (math-verify, boxes first), as DeepSeek's own is not published"
STEP_BY_STEP = r"Please reason step by step, and put your final answer within \boxed{}."
CHINESE_STEP_BY_STEP = r"请通过逐步推理来解答问题，并把最终答案放置于\boxed{}中。"
QUESTION_STOPS = ("Question:", "</s>", "<|im_end|>")


def reasoning(samples: int) -> SuiteSampling:
    """Return DeepSeek's sampling: temperature 0.6, top-p 0.95, at most 32,768 tokens."""
    return SuiteSampling(0.6, 0.95, 32768, samples)


def greedy(max_new_tokens: int, *stop: str) -> SuiteSampling:
    """Return greedy decoding of one response."""
    return SuiteSampling(0.0, 1.0, max_new_tokens, 1, stop)


# ---------------------------------------------------------------- metrics

LAST_BOX = (
    r"after `</think>`; math-verify, the last `\boxed{}` first, then LaTeX and numbers; floats to 5 decimals"
)


def _boxed(item: Item, text: str) -> str | None:
    return boxed_answer(after_thought(text))


def _last_box(gold: Callable[[Item], str], kind: str) -> Metric:
    """Return the metric for gold answers of a kind of math-verify: `expr`, a number, or `latex`."""
    judge = MathVerify((kind,), ("latex", "expr"), 0, 5, True)
    return Metric(
        "math_verify",
        lambda item, text: (judge.is_correct(gold(item), after_thought(text)),),
        LAST_BOX,
        answer=_boxed,
    )


def _any_mathematics(gold: Callable[[Item], str]) -> Metric:
    judge = MathVerify(last_box=True)
    return Metric(
        "math_verify",
        lambda item, text: (judge.is_correct(gold(item).strip(), after_thought(text).strip()),),
        "after `</think>`; math-verify, LaTeX and numbers in both texts; floats to 6 decimals",
        answer=_boxed,
    )


def _gsm8k_match(name: str, pattern: str, which: int, where: str) -> Metric:
    ignored = (",", r"\$", "(?s).*#### ", r"\.$")

    def judge(item: Item, text: str) -> tuple[bool]:
        return (exact_match(item.row["answer"], find_match(pattern, text, which), ignored),)

    return Metric(name, judge, f"{where}; equal texts without commas, dollar signs and the last full stop")


def _aime_match(item: Item, text: str) -> tuple[bool]:
    box = last_box(text)
    return (is_equivalent(item.gold, between_dollars(text) if box is None else box),)


def _hendrycks_match(item: Item, text: str) -> tuple[bool]:
    return (is_equivalent(last_box(item.row["solution"]) or item.gold, between_dollars(text)),)


_WHOLE_RESPONSE = MathVerify(rounding=6)
MINERVA_VERIFY = Metric(
    "math_verify",
    lambda item, text: (_WHOLE_RESPONSE.is_correct(item.row["solution"], text),),
    "math-verify 0.9 with its defaults, on the whole response and the published solution",
)
HENDRYCKS = Metric(
    "exact_match",
    _hendrycks_match,
    "what stands between the first and the last dollar sign; equal after Hendrycks' normalisation",
)
STRICT = _gsm8k_match("strict-match", r"#### (\-?[0-9\.\,]+)", 0, "the number after the first `#### `")
FLEXIBLE = _gsm8k_match("flexible-extract", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1, "the last number")


# ---------------------------------------------------------------- GSM8K


def _read_gsm8k(rows: Sequence[Row], _: str) -> list[Item]:
    return [
        Item(f"gsm8k/{i}", row["question"], row["answer"].rpartition("####")[2].strip(), row=row)
        for i, row in enumerate(rows)
    ]


def _worked_answer(item: Item) -> str:
    return item.row["answer"]


GSM8K = Suite(
    "gsm8k",
    "GSM8K",
    Source("Training Verifiers to Solve Math Word Problems", "https://arxiv.org/abs/2110.14168", "2021"),
    "https://huggingface.co/datasets/openai/gsm8k (configuration main), or "
    "https://github.com/openai/grade-school-math",
    {"test": ("*test*",), "train": ("*train*",)},
    ("question", "answer"),
    1319,
    _read_gsm8k,
    (
        Protocol(
            "deepseek",
            R1_README,
            Prompt("{question}\n" + STEP_BY_STEP),
            (_last_box(lambda item: item.gold, "expr"),),
            reasoning(1),
            note=f"DeepSeek publishes no score of R1 on GSM8K; {OPEN_R1}",
        ),
        Protocol(
            "lm-eval",
            Source("lm-evaluation-harness 0.4.13, gsm8k", f"{LM_EVAL}/gsm8k/gsm8k.yaml", "3.0"),
            Prompt(
                "Question: {question}\nAnswer:",
                chat=False,
                shots=Shots(5, "train", "random"),
                answer=_worked_answer,
            ),
            (STRICT, FLEXIBLE),
            greedy(256, *QUESTION_STOPS),
        ),
        Protocol(
            "lighteval",
            Source("lighteval 0.13.0, gsm8k", f"{LIGHTEVAL}/gsm8k.py", "0"),
            Prompt("Question: {question}\nAnswer:"),
            (_last_box(lambda item: f" {item.row['answer']}", "expr"),),
            greedy(256, "Question:"),
        ),
    ),
)

# ---------------------------------------------------------------- MATH-500

MINERVA = Path(__file__).with_name("minerva.yaml")  # four worked examples


def _minerva_shots() -> Shots:
    pairs = yaml.safe_load(MINERVA.read_text(encoding="utf-8"))
    return Shots(len(pairs), fixed=tuple((pair["question"], pair["answer"]) for pair in pairs))


def _read_math(rows: Sequence[Row], _: str) -> list[Item]:
    return [
        Item(f"math-500/{i}", row["problem"], row["answer"], category=str(row.get("subject", "")), row=row)
        for i, row in enumerate(rows)
    ]


MATH_500 = Suite(
    "math-500",
    "MATH-500",
    Source("Let's Verify Step by Step", "https://arxiv.org/abs/2305.20050", "2023"),
    "https://huggingface.co/datasets/HuggingFaceH4/MATH-500",
    {"test": ("*test*",)},
    ("problem", "solution", "answer"),
    500,
    _read_math,
    (
        Protocol(
            "deepseek",
            R1_README,
            Prompt("{question}\n" + STEP_BY_STEP),
            (_last_box(lambda item: item.row["solution"], "latex"),),
            reasoning(4),
            note=f"four samples as in open-r1's reproduction; {OPEN_R1}",
        ),
        Protocol(
            "lm-eval",
            Source(
                "lm-evaluation-harness 0.4.13, minerva_math500",
                f"{LM_EVAL}/minerva_math/minerva_math500.yaml",
                "3.1",
            ),
            Prompt(
                "Problem:\n{question}\n\nSolution:",
                chat=False,
                shots=_minerva_shots(),
            ),
            (MINERVA_VERIFY,),
            greedy(256, "Problem:"),
            note="its second metric, exact_match, needs another parser of LaTeX and is left out",
        ),
        Protocol(
            "lm-eval-hendrycks",
            Source(
                "lm-evaluation-harness 0.4.13, hendrycks_math500",
                f"{LM_EVAL}/hendrycks_math/hendrycks_math500.yaml",
                "1.0",
            ),
            Prompt("Problem: {question}\nAnswer:", chat=False),
            (HENDRYCKS,),
            greedy(256, "Problem:"),
        ),
        Protocol(
            "lighteval",
            Source("lighteval 0.13.0, math_500", f"{LIGHTEVAL}/math_500.py", "2"),
            Prompt(
                "Solve the following problem. The final line of your response MUST be of the following "
                'format:\n"ANSWER: $ANSWER" (without quotes) where $ANSWER is the final answer. Think step '
                "by step before answering.\n\n{question}"
            ),
            (_any_mathematics(lambda item: f"ANSWER: {item.row['solution']}"),),
            greedy(32768),
        ),
    ),
)

# ---------------------------------------------------------------- AIME


def _read_aime(year: int) -> Callable[[Sequence[Row], str], list[Item]]:
    def read(rows: Sequence[Row], _: str) -> list[Item]:
        items = []
        for i, row in enumerate(rows):
            items.append(Item(f"aime-{year}/{i}", row["problem"], str(row["answer"]).strip(), row=row))
        return items

    return read


_AIME_LIGHTEVAL = (
    "\nSolve the following math problem efficiently and clearly.  The last line of your response should be "
    "of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' "
    "(without quotes) where ANSWER is just the final number or expression that solves the problem. Think "
    "step by step before answering.\n\n{question}\n"
)


def _aime(year: int, home: str, task: str) -> Suite:
    """Return the suite of the 30 problems of one year, I and II."""
    return Suite(
        f"aime-{year}",
        f"AIME {year}",
        Source(
            "American Invitational Mathematics Examination",
            "https://maa.org/maa-invitational-competitions",
            str(year),
        ),
        home,
        {"test": (f"*{year}*", "*train*", "*test*", "*aime*")},
        ("problem", "answer"),
        30,
        _read_aime(year),
        (
            Protocol(
                "deepseek",
                R1_README,
                Prompt("{question}\n" + STEP_BY_STEP),
                (_last_box(lambda item: item.gold, "expr"),),
                reasoning(64),
                note=f"64 responses a problem; {OPEN_R1}",
            ),
            Protocol(
                "lm-eval",
                Source(f"lm-evaluation-harness 0.4.13, {task}", f"{LM_EVAL}/aime/{task}.yaml", "0.0"),
                Prompt("Question: {question}\nAnswer:", chat=False),
                (
                    Metric(
                        "exact_match",
                        _aime_match,
                        "the last box, else what stands between the first and the last dollar sign; equal "
                        "after Hendrycks' normalisation",
                    ),
                ),
                greedy(32768, *QUESTION_STOPS, "<|eot_id|>"),
            ),
            Protocol(
                "lighteval",
                Source(f"lighteval 0.13.0, {task}", f"{LIGHTEVAL}/aime.py", "2"),
                Prompt(_AIME_LIGHTEVAL),
                (_any_mathematics(lambda item: item.gold),),
                greedy(32768),
                note="aime24_avg and aime25_avg are the same with 64 samples",
            ),
        ),
    )


AIME_2024 = _aime(
    2024, "https://huggingface.co/datasets/HuggingFaceH4/aime_2024 (or Maxwell-Jia/AIME_2024)", "aime24"
)
AIME_2025 = _aime(2025, "https://huggingface.co/datasets/yentinglin/aime_2025 (or math-ai/aime25)", "aime25")

# ---------------------------------------------------------------- CMATH


def _read_cmath(rows: Sequence[Row], _: str) -> list[Item]:
    return [
        Item(f"cmath/{i}", row["question"], str(row["golden"]), category=str(row.get("grade", "")), row=row)
        for i, row in enumerate(rows)
    ]


CMATH = Suite(
    "cmath",
    "CMATH",
    Source(
        "CMATH: Can Your Language Model Pass Chinese Elementary School Math Test?",
        "https://arxiv.org/abs/2306.16636",
        "2023",
    ),
    "https://huggingface.co/datasets/weitianwen/cmath",
    {"test": ("*test*",), "dev": ("*dev*",)},
    ("question", "golden"),
    1098,
    _read_cmath,
    (
        Protocol(
            "deepseek",
            Source(
                "DeepSeekMath, README: prompt for Chinese questions",
                "https://github.com/deepseek-ai/DeepSeek-Math",
                "2024",
            ),
            Prompt("{question}\n" + CHINESE_STEP_BY_STEP),
            (_last_box(lambda item: item.gold, "expr"),),
            reasoning(1),
            note=f"sampling as for R1, which is not reported on CMATH; {OPEN_R1}",
        ),
    ),
)
