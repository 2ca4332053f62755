"""Chat templates are programs from strangers: what they may do, and what they may not."""

from __future__ import annotations

import sys
import time

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from limbeck.config.recipe import Load
from limbeck.pipeline.stages.load import read_tokenizer
from limbeck.text.tokenizer import Tokenizer
from limbeck.types import LimbeckError

ESCAPES = {
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "changes what it is given": "{{ messages.append(1) }}",
    "imports": "{% import 'os' as os %}",
}
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}x"
    "{% endfor %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(999999999) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "long text": "{{ 'x' * 10 ** 12 }}",
}
MISTAKES = {
    "unknown filter": "{{ messages | frobnicate }}",
    "division": "{{ 1 / 0 }}",
    "unclosed": "{% for m in messages %}",
}


def tokenizer(template: str) -> Tokenizer:
    words = {word: i for i, word in enumerate(["[UNK]", "<end>", "hello"])}
    return Tokenizer(Backend(WordLevel(words, unk_token="[UNK]")), template, end="<end>", pad="<end>")


@pytest.mark.parametrize(
    "template",
    [*ESCAPES.values(), *ENDLESS.values(), *MISTAKES.values()],
    ids=[*ESCAPES, *ENDLESS, *MISTAKES],
)
def test_bad_templates_end_in_one_sentence(template):
    begin = time.monotonic()
    with pytest.raises(LimbeckError, match=r"chat_template.jinja: .*; mend the template") as caught:
        tokenizer(template).prompt("hello")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 60
    assert sys.gettrace() is None or "check_clock" not in repr(sys.gettrace())


def test_a_usual_template_is_rendered_as_it_stands():
    template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '=' * 3 }}<|assistant|>{% endif %}"
    )
    asked = [{"role": "system", "content": " short "}, {"role": "user", "content": "hello"}]
    assert tokenizer(template).render(asked) == "<|system|>short<end><|user|>hello<end>===<|assistant|>"


def test_another_token_ends_responses(tmp_path):
    changed = tokenizer("").ending_with("hello")
    assert (changed.end, changed.end_id, changed.pad) == ("hello", 2, "<end>")
    changed.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert again.end_id == 2 and again.decode([1, 2]) == "<end>"


def test_a_load_stage_names_the_end_of_responses(tmp_path):
    tokenizer("{{ messages[0].content }}").save(tmp_path)
    stage = Load(kind="load", path=str(tmp_path))
    assert read_tokenizer(stage, tmp_path).end == "<end>"
    assert read_tokenizer(stage.model_copy(update={"eos_token": "hello"}), tmp_path).end == "hello"


def test_an_end_of_two_tokens_is_refused():
    byte = Backend(WordLevel({"[UNK]": 0, "<end>": 1, "a": 2}, unk_token="[UNK]"))
    byte.pre_tokenizer = Whitespace()
    with pytest.raises(LimbeckError, match="^eos_token = 'a a' is 2 tokens .*; give the text of a single"):
        Tokenizer(byte, "", "<end>", "<end>").ending_with("a a")
