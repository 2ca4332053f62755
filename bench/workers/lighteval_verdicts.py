"""lighteval's side of bench/eval_peers.py: the prompts of its tasks and the verdicts of its metrics on given
responses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lighteval.metrics.metrics import Metrics
from lighteval.models.model_output import ModelResponse
from lighteval.utils.utils import remove_reasoning_tags

THOUGHT = [("<think>", "</think>")]


def main() -> None:
    """Read the cases, apply prompt function and metric, and write prompts and verdicts."""
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    prompt, metric = of(case["suite"])
    rows = []
    for row, text, letter in zip(case["rows"], case["responses"], case["golds"], strict=True):
        doc = prompt(row)
        if case["suite"] == "gpqa-diamond":  # its own order is random
            doc.gold_index = "ABCD".index(letter)
        answer = ModelResponse(text=[text], text_post_processed=[remove_reasoning_tags(text, THOUGHT)])
        found = metric.compute(doc=doc, model_response=answer)
        found = found if isinstance(found, dict) else {"verdict": [bool(found)]}
        verdicts = {
            name: value if isinstance(value, list) else [bool(value)] for name, value in found.items()
        }
        rows.append({"prompt": doc.query, "verdicts": verdicts})
    Path(sys.argv[2]).write_text(json.dumps({"rows": rows}), encoding="utf-8")


def of(suite: str):
    """The prompt function and the metric of a suite."""
    from lighteval.tasks.tasks import aime, gpqa, gsm8k, math_500, mmlu_pro
    from lighteval.tasks.tasks.ifeval import main as ifeval

    mathematics = Metrics.pass_at_k_math(sample_params={"k": 1, "n": 1}).sample_level_fn
    return {
        "gsm8k": (gsm8k.gsm8k_prompt, Metrics.expr_gold_metric.value.sample_level_fn),
        "math-500": (math_500.math_500_prompt, mathematics),
        "aime-2024": (aime.aime_prompt, mathematics),
        "gpqa-diamond": (
            gpqa.gpqa_instruct_prompt,
            Metrics.gpqa_instruct_pass_at_k(sample_params={"k": 1, "n": 1}).sample_level_fn,
        ),
        "mmlu-pro": (mmlu_pro.mmlu_pro_prompt_function, Metrics.gpqa_instruct_metric.value.sample_level_fn),
        "ifeval": (ifeval.ifeval_prompt, ifeval.IFEvalMetrics()),
    }[suite]


main()
