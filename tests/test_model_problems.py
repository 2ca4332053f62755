"""What the chat knows of a model's own problems: examples, questions unlike them, and its settings."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from speaker import Stub
from test_safety import asked

from limbeck.serve.app import build
from limbeck.serve.markup import to_html
from limbeck.serve.model_problems import ModelProblems, problems_of, words_of
from limbeck.serve.pages import say

RECIPE = """
name: tiny
problems:
  clock: {source: miniature, modulus: 3, numbers: 3, largest: 2}
  chat: {source: miniature, modulus: 3, numbers: 3, largest: 2, task: repeat}
stages:
  base: {kind: load, path: nowhere}
  zero: {kind: rl, model: base, problems: {clock: 1}}
"""


@pytest.fixture
def runs(tmp_path):
    """A folder of runs with one stage, `zero`, that was trained on `clock` and not on `chat`."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "tiny" / "stages.json").write_text(json.dumps({"base": "load-1", "zero": "rl-2"}))
    shared = {"inputs": {}, "settings": {}, "licences": []}
    origin = {"problems": ["clock (miniature clock)"], "models": [], "teachers": [], "editors": []}
    base = {"kind": "load", "key": "1", "stage": "base", "sources": {"problems": []}}
    zero = {"kind": "rl", "key": "2", "stage": "zero", "sources": origin, "inputs": {"base": {"key": "1"}}}
    for folder, manifest in (("load-1", base), ("rl-2", zero)):
        (tmp_path / "store" / folder / "model").mkdir(parents=True)
        (tmp_path / "store" / folder / "manifest.json").write_text(json.dumps({**shared, **manifest}))
    return tmp_path


def test_examples_are_held_out_problems_of_the_kinds_that_the_model_was_trained_on(runs):
    found = problems_of(runs / "store" / "rl-2" / "model", runs)
    assert len(found.examples) == 4 and all(one.endswith(" ?") for one in found.examples)
    assert not any(one.startswith(("say", "说")) for one in found.examples)  # these are of `chat`
    assert found.words == {"use", "make", "用", "凑", "0", "?"} and found.pretrained


@pytest.mark.parametrize("missing", ["tiny/stages.json", "tiny/recipe.yaml", "store/rl-2/manifest.json"])
def test_of_a_model_whose_story_is_lost_nothing_is_said(runs, missing):
    (runs / missing).unlink()
    assert problems_of(runs / "store" / "rl-2" / "model", runs) is None


@pytest.mark.parametrize(
    ("question", "unknown"),
    [
        ("use 5 1 6 make 4 ?", []),
        ("use 99 cats make 3 ?", []),  # one word in five
        ("Use 5", []),
        ("12*7", ["*"]),
        ("What is the capital of France?", ["what", "is", "the", "capital", "of", "france"]),
        ("法国的首都", ["法", "国", "的", "首", "都"]),
        ("", []),
    ],
)
def test_a_question_is_unlike_the_problems_if_half_of_its_words_are_in_none(question, unknown):
    known = ModelProblems((), frozenset(words_of("use 5 1 make 4 ? 用 5 凑 4 ?")), False)
    assert known.unknown_words(question) == unknown


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("so <answer>5 **1**</answer>.", '<p>so <span class="final">5 <strong>1</strong></span>.</p>'),
        ("<answer>\n7\n</answer>", '<p><span class="final">\n7\n</span></p>'),
        ("cut <answer>5", "<p>cut 5</p>"),
        ("5</answer>", "<p>5</p>"),
        ("`<answer>` is a tag", "<p><code>&lt;answer&gt;</code> is a tag</p>"),
        ("<answer><b>5</b></answer>", '<p><span class="final">&lt;b&gt;5&lt;/b&gt;</span></p>'),
    ],
)
def test_tags_of_answers_are_not_shown(text, html):
    assert to_html(text).strip() == html


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_chat_offers_examples_and_says_what_is_unlike_them(runs, language):
    service = Stub(lambda *_: ("", "<answer>1</answer>"))
    service.models = {
        "zero": SimpleNamespace(name="zero", folder=runs / "store" / "rl-2" / "model"),
        "other": SimpleNamespace(name="other", folder=runs),
    }
    app = build(runs, service)
    example = problems_of(runs / "store" / "rl-2" / "model", runs).examples[1]
    said = {"accept-language": language}
    settings = {"top_p": "0.5", "max_tokens": "9", "system": "Be\r\nbrief. "}
    home, chosen, unknown, begun = asked(
        app,
        ("GET", "/chat", {"headers": said}),
        ("GET", "/chat?model=zero&example=1", {"headers": said}),
        ("GET", "/chat?model=other&example=1", {"headers": said}),
        ("POST", "/chat", {"data": {"text": "Hello there", "model": "zero", **settings}}),
    )
    assert (
        home.text.count('class="examples"') == 1 and say(language, "chat.examples", model="zero") in home.text
    )
    assert (
        f"\n{example}</textarea>" in chosen.text and f"{example}</textarea>" not in home.text + unknown.text
    )
    page, exported = asked(
        app,
        ("GET", begun.headers["location"], {"headers": said}),
        ("GET", begun.headers["location"] + "/export.json", {}),
    )
    note = say(language, "chat.unlike_pretrained", model="zero", words="hello, there")
    assert f'<p class="unlike">{note}</p>' in page.text
    assert "Be\nbrief.</textarea>" in page.text
    (side,) = exported.json()["sides"]
    assert side["messages"][0] == {"role": "system", "content": "Be\nbrief."}
    assert {"top_p": 0.5, "max_tokens": 9, "system": "Be\nbrief."}.items() <= side["answers"][0].items()
