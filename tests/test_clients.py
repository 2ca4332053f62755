"""Clients of the API that are not ours: lm-eval's two kinds of local models, and a fuzzer."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from served import KEY, save, server

from limbeck.model import weights
from limbeck.model.kv_cache import Packed

pytestmark = pytest.mark.slow

CHOICES = ("5 -1 -6", "say 4", "6 *5 +1")
QUESTIONS = ("use 5 1 6 make 4 ?", "say 4 ?", "use 6 1 5 make 3 ?", "use 2 2 4 make 6 ?")
TASKS = {
    "choosing": {
        "output_type": "multiple_choice",
        "doc_to_text": "<bos> User: {{question}} Assistant:",
        "doc_to_choice": list(CHOICES),
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "telling": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{question}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("served")
    with server(folder, f"plain={save(folder / 'plain', tokenizer)}", max_tokens=4) as found:
        yield found, folder


@pytest.fixture
def measured(served, tmp_path, monkeypatch):
    """What lm-eval makes of a task through one of its clients: the results, and what every document gave."""
    lm_eval = pytest.importorskip("lm_eval")
    found, _ = served
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": q, "answer": 0}) + "\n" for q in QUESTIONS)
    )
    for name, task in TASKS.items():
        rows = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **rows, **task}))

    def measure(client: str, path: str, task: str, **more):
        told = lm_eval.simple_evaluate(
            client,
            {"base_url": found.url + path, "model": "plain", "num_concurrent": 2, "max_retries": 1, **more},
            [task],
            bootstrap_iters=0,
            task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
            apply_chat_template="chat" in client,
            log_samples=True,
        )
        return told["results"][task], told["samples"][task]

    return measure


def scores(folder, tokenizer, question: str) -> list[float]:
    """The log-probability of each choice, by the model itself."""
    model, begin = weights.load(folder / "plain"), tokenizer.encode(f"<bos> User: {question} Assistant:")
    found = []
    for choice in CHOICES:
        tokens = torch.tensor(begin + tokenizer.encode(choice))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens, Packed([len(tokens)])) @ model.head.weight.T, -1)
        found.append(float(logprobs[len(begin) - 1 : -1].gather(1, tokens[len(begin) :, None]).sum()))
    return found


def test_lm_eval_scores_choices_as_the_model_does(served, measured, tokenizer):
    _, folder = served
    results, samples = measured(
        "local-completions",
        "/v1/completions",
        "choosing",
        tokenizer=str(folder / "plain"),
        tokenizer_backend="huggingface",
    )
    wanted = [scores(folder, tokenizer, sample["doc"]["question"]) for sample in samples]
    given = [[float(one[0][0]) for one in sample["resps"]] for sample in samples]
    assert len(samples) == len(QUESTIONS)
    np.testing.assert_allclose(given, wanted, atol=1e-3)
    assert results["acc,none"] == np.mean([np.argmax(one) == 0 for one in wanted])


@pytest.mark.parametrize(
    ("client", "path"),
    [("local-completions", "/v1/completions"), ("local-chat-completions", "/v1/chat/completions")],
    ids=["text", "chat"],
)
def test_lm_eval_hears_what_is_said(served, measured, client, path):
    found, folder = served
    more = (
        {"tokenizer": str(folder / "plain"), "tokenizer_backend": "huggingface"}
        if client == "local-completions"
        else {}
    )
    _, samples = measured(client, path, "telling", **more)
    texts = [sample["resps"][0][0] for sample in samples]
    assert (
        len(texts) == len(QUESTIONS) and all(texts) and found.service.models["plain"].scheduler.failures == 0
    )


def test_nothing_a_fuzzer_sends_is_our_fault(served):
    """Every operation of the OpenAPI description, valid and invalid requests: no status of 500 or more."""
    schemathesis = pytest.importorskip("schemathesis")
    found, _ = served
    schema = schemathesis.openapi.from_dict(found.app.app.openapi())
    asked: dict[str, set[int]] = {}
    for operation in (result.ok() for result in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=12,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case):
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "plain"
                if (
                    isinstance(case.body, dict)
                    and isinstance(case.body.get("max_tokens"), int)
                    and case.body["max_tokens"] < 4000
                ):
                    case.body["max_tokens"] = min(case.body["max_tokens"], 6)
                answer = case.call(base_url=found.url, headers=found.headers, timeout=60)
                asked.setdefault(case.path, set()).add(answer.status_code)
                assert answer.status_code < 500, (case.path, case.body, answer.text)

            with suppress(Unsatisfiable):  # nothing can be wrong about a request without parameters
                ask()
    assert found.service.models["plain"].scheduler.failures == 0
    assert {200, 400} <= asked["/v1/completions"] and 400 in asked["/v1/chat/completions"], asked
