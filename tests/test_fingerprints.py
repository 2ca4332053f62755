"""Other models' traces in rows: found in both languages, not where there are none, and never called proof."""

from __future__ import annotations

import json

import pytest

from limbeck.pipeline.provenance.fingerprints import traces
from limbeck.types import LimbeckError

SAID = {
    "I am ChatGPT, and I can help.": "names itself",
    "Hello! My name is Claude.": "names itself",
    "I'm an AI called Gemini": "names itself",
    "你好，我是ChatGPT。": "names itself",
    "我叫通义千问，很高兴": "names itself",
    "a large language model trained by OpenAI": "names its maker",
    "我是一个由OpenAI开发的模型": "names its maker",
    "As an AI language model, I cannot": "speaks as an assistant does",
    "作为一个人工智能语言模型，我不能": "speaks as an assistant does",
    "try 6 *5 gives 2 +1 gives 3 =4 gives 6 no": None,
    "I am sure that openai is a company; the farmer, developed by years of rain": None,
    "我是学生，我有三个苹果": None,
    "Bard of Avon is a name for Shakespeare, and a llama is an animal": None,
}


@pytest.mark.parametrize("text, kind", SAID.items())
def test_what_a_text_says_of_itself(text, kind):
    found = {trace.kind for trace in traces([{"id": "a", "completion": text}]) if trace.rows}
    assert found == ({kind} if kind else set())


def test_traces_are_counted_with_examples_the_usual_ones_first():
    rows = [
        {"id": f"r/{i}", "completion": text}
        for i, text in enumerate(["I am Claude."] + ["I am ChatGPT."] * 4 + ["no"] * 5)
    ]
    trace = traces(rows)[0]
    assert (trace.rows, trace.of) == (5, 10)
    assert [text for _, text in trace.examples] == ["I am ChatGPT"] * 3


TOLD = "Let us weigh the options one by one and then decide calmly"
MESSAGES = [{"role": "user", "content": "x"}, {"role": "assistant", "content": TOLD}]


@pytest.mark.parametrize("name, text", [
    ("c.txt", f"other\n{TOLD}\n"),
    ("c.jsonl", json.dumps({"response": TOLD})),
    ("d.jsonl", json.dumps({"messages": MESSAGES}) + "\n\n"),
])  # fmt: skip
def test_runs_of_words_that_a_corpus_has_as_well(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    rows = [
        {"id": "a", "completion": f"Well: {TOLD.upper()}!"},
        {"id": "b", "completion": "Let us weigh the options one by two"},
    ]
    trace = traces(rows, tmp_path / name)[-1]
    assert (trace.rows, trace.of) == (1, 2)
    assert trace.examples == (("a", "let us weigh the options one by one"),)


def test_a_corpus_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnonsense\n')
    with pytest.raises(LimbeckError, match=r"bad.jsonl, line 2: not a JSON object"):
        traces([], tmp_path / "bad.jsonl")
    with pytest.raises(LimbeckError, match="none.txt is no file"):
        traces([], tmp_path / "none.txt")


def test_why_reports_them_as_evidence(call, finished, tmp_path):
    (tmp_path / "closed.txt").write_text(TOLD)
    said = call("why", "dev1", "--fingerprints", "--corpus", tmp_path / "closed.txt", "--runs", finished.home)
    lines = said.out.splitlines()
    assert said.code == 0
    assert lines[0].startswith("0 of ")
    assert "evidence, never proof" in lines[-1]
    assert len(lines) == 5
    told = json.loads(call("why", "dev1", "--fingerprints", "--runs", finished.home, "--json").out)["data"]
    assert [trace["kind"] for trace in told] == [
        "names itself",
        "names its maker",
        "speaks as an assistant does",
    ]
    assert all(trace["rows"] == 0 and trace["of"] > 0 for trace in told)
