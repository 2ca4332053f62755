"""lm-eval's side of bench/eval_peers.py: the prompts, verdicts and log-likelihood metrics of its own tasks on
local rows, either for responses that are given or for those of a model."""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path

import lm_eval
import yaml
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

TASKS = Path(lm_eval.__file__).parent / "tasks"


class Given(LM):
    """A model whose responses are given, in the order of the rows."""

    def __init__(self, responses: list[str]):
        super().__init__()
        self.responses = responses

    def generate_until(self, requests, disable_tqdm=False):
        """The given response of each row."""
        return [self.responses[request.doc_id] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        """A number that depends on the text alone."""
        return [(-float(zlib.crc32("".join(request.args).encode()) % 9973), False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """No task here asks for it."""
        raise NotImplementedError


def main() -> None:
    """Read the cases, evaluate, and write prompts and verdicts."""
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        task = {
            "include": str(TASKS / case["yaml"]),
            "task": "local",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": case["files"]},
            **case.get("changes", {}),
        }
        (Path(folder) / "local.yaml").write_text(yaml.safe_dump(task, allow_unicode=True), encoding="utf-8")
        found = lm_eval.simple_evaluate(
            model=model_of(case),
            tasks=["local"],
            task_manager=TaskManager(include_path=folder),
            log_samples=True,
            limit=case.get("limit"),
            bootstrap_iters=0,
            gen_kwargs=case.get("gen_kwargs"),
        )
    Path(sys.argv[2]).write_text(json.dumps(summary(found["samples"]["local"])), encoding="utf-8")


def model_of(case: dict) -> LM:
    """The model that is asked."""
    if "model" not in case:
        return Given(case["responses"])
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=case["model"], device="cpu", dtype="float32", batch_size=8)


def summary(samples: list[dict]) -> dict:
    """Prompts, responses and verdicts by row; a metric has the name of its filter, if it has one."""
    rows: dict[int, dict] = {}
    for sample in samples:
        row = rows.setdefault(sample["doc_id"], {"verdicts": {}})
        row["prompt"] = sample["arguments"][0][0]
        row["response"] = str(sample["resps"][0][0])
        for name in sample["metrics"]:
            label = name if sample["filter"] == "none" else sample["filter"]
            value = sample[name]
            row["verdicts"][label] = value if isinstance(value, list) else [bool(value)]
    return {"rows": [rows[i] for i in sorted(rows)]}


main()
