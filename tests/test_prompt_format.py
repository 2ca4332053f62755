"""Prompt formats: system prompts and templates, from the recipe into prompts, rows, models and chats."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from limbeck.config import aliases
from limbeck.config.load import load
from limbeck.config.recipe import Files
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.provenance.release import release
from limbeck.pipeline.stages.rows import to_row, to_sample
from limbeck.pipeline.store import Store
from limbeck.serve.service import _encode_chat
from limbeck.tasks.files import FileTask
from limbeck.text.prompt_format import FILE, PromptFormat, format_of_rows
from limbeck.text.tokenizer import Tokenizer
from limbeck.types import LimbeckError, Problem

BRIEF = "say 1"
QUESTION = "say 4 ?"
WRAPPED = PromptFormat(BRIEF, "use 1 {problem} now")

RECIPE = """
name: formats
licence: own
threads: 1
problems:
  own: {source: files, path: own.jsonl, held_out: 2, licence: own, template: '%s', system: %s, answer: final}
stages:
  base: {kind: load, path: model}
  zero: {kind: rl, model: base, problems: {own: 1}, steps: 1, sampling: {max_new_tokens: 8},
         policy: {prompts_per_step: 2, group_size: 2, zero_variance: keep}}
  rows: {kind: sample, model: base, problems: {own: 1}, prompts: 32, samples: 8, correct: false,
         wellformed: false, sampling: {max_new_tokens: 60}}
  taught: {kind: sft, model: base, rows: {rows: 1}, epochs: 1}
"""


def write(folder, template="{problem}", system="null", recipe=RECIPE):
    rows = [{"question": f"say {i} ?", "answer": str(i)} for i in range(1, 8)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "formats.yaml"
    path.write_text(recipe % (template, system))
    return path


def words(template: str) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "<end>", "hello"])}
    return Tokenizer(Backend(WordLevel(vocabulary, unk_token="[UNK]")), template, end="<end>", pad="<end>")


# ---------------------------------------------------------------- in the recipe


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Think.", "problems.own.template has no {problem}; put it where the question belongs"),
        ("{question} {problem}", "{question}, which stands for nothing; the only placeholder is {problem}"),
        ("{{problem}}", "write {problem} with single braces"),
    ],
)
def test_a_template_without_its_placeholder_is_refused(tmp_path, template, said):
    with pytest.raises(LimbeckError) as caught:
        load(write(tmp_path, template))
    assert said in str(caught.value) and "formats.yaml" in str(caught.value)


def test_a_template_that_yaml_cannot_read_is_refused_with_the_remedy(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text().replace("'{problem}'", "{problem} Think."))
    with pytest.raises(LimbeckError, match="not valid YAML: .*; put a text that begins with { into single"):
        load(path)


def test_a_template_that_yaml_reads_as_a_mapping_is_refused_with_the_remedy(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text().replace("'{problem}'", "{problem}"))
    with pytest.raises(LimbeckError, match="problems.own.template: .*; put it in quotes"):
        load(path)


@pytest.mark.parametrize(("system", "said"), [("' '", "is empty"), ("'Solve {problem}.'", "{problem}")])
def test_a_system_prompt_that_says_nothing_or_has_placeholders_is_refused(tmp_path, system, said):
    with pytest.raises(LimbeckError, match="problems.own.system") as caught:
        load(write(tmp_path, system=system))
    assert said in str(caught.value)


def test_braces_of_latex_and_json_are_no_placeholders(tmp_path):
    template = r'{problem} Write \boxed{answer} or \frac{a}{b} or {"answer": 1}.'
    assert load(write(tmp_path, template)).problems["own"].template == template


def test_the_old_word_is_read_and_no_key_changes(tmp_path, decoder, tokenizer, capsys):
    from limbeck.model import weights

    weights.save(decoder(), tmp_path / "model", tokenizer)
    path = write(tmp_path, "use {problem}")
    aliases._noticed.clear()

    def identities(recipe) -> list:
        graph = Graph(recipe, Store(tmp_path / "store"), tmp_path)
        return [graph._source(problems) for problems in graph.recipe.problems.values()]

    new = identities(load(path))
    path.write_text(path.read_text().replace("template:", "instruction:"))
    old = load(path)
    assert "`instruction` in a recipe is called `template` now" in capsys.readouterr().err
    assert identities(old) == new
    assert "system" not in new[0] and "template" not in new[0] and new[0]["instruction"] == "use {problem}"
    other = load(path, ["problems.own.instruction=now {problem}"])
    assert other.problems["own"].template == "now {problem}"
    told = identities(load(path, ["problems.own.system=Be terse."]))
    assert told[0] == {**new[0], "system": "Be terse."}
    path.write_text(path.read_text().replace("system: null", "template: '{problem}'"))
    with pytest.raises(LimbeckError, match="problems.own has instruction and template.*keep template"):
        load(path)


# ---------------------------------------------------------------- in prompts and rows


def test_a_problem_carries_its_format_into_prompt_row_and_sample(tmp_path, decoder, tokenizer):
    write(tmp_path)
    settings = Files(
        source="files", path="own.jsonl", held_out=2, system=BRIEF, template="use 1 {problem}", answer="final"
    )
    problem = FileTask("own", settings, tmp_path).problems("train")[0]
    engine = Engine(decoder(), tokenizer)
    (group,) = engine.rollout([problem], 1, SamplingParams(1.0, 1.0, 8), 0)
    asked = [{"role": "system", "content": BRIEF}, {"role": "user", "content": problem.prompt}]
    assert problem.prompt.startswith("use 1 say ")
    assert group.prompt_tokens.tolist() == tokenizer.prompt(asked).tolist()
    assert tokenizer.decode(group.prompt_tokens).startswith("<bos> say 1 User:")
    row = to_row(group, group.completions[0], {})
    sample = to_sample(row, tokenizer, "keep")
    assert np.array_equal(sample.tokens[: sample.start], group.prompt_tokens)
    assert format_of_rows([row, {"prompt": "x"}]) == PromptFormat(BRIEF, "use 1 {problem}")
    plain = to_row(group.__class__(Problem("own/1", "x"), group.prompt_tokens, ()), group.completions[0], {})
    assert not {"system", "template"} & plain.keys()


def test_a_system_prompt_longer_than_the_context_is_refused_with_numbers(decoder, tokenizer):
    problem = Problem("own/1", "x", system="say " * 200)
    with pytest.raises(LimbeckError) as caught:
        Engine(decoder(), tokenizer).rollout([problem], 1, SamplingParams(1.0, 1.0, 8), 0)
    assert str(caught.value).startswith("problems.own.system: 200 tokens and max_new_tokens=8 exceed")
    assert "128 positions" in str(caught.value)


LEAVES_OUT = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"
RAISES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}[{{ messages[0].content }}]"
)


@pytest.mark.parametrize("template", [LEAVES_OUT, RAISES], ids=["leaves it out", "raises"])
def test_without_a_system_role_the_system_prompt_begins_the_user_message(template):
    asked = [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}]
    assert words(template).render(asked) == "[short\n\nhello]"
    assert words(template).render(asked[1:]) == "[hello]"


def test_a_model_without_a_chat_template_gets_the_texts_as_they_stand(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    base = Tokenizer.from_directory(tmp_path)
    asked = [{"role": "system", "content": "short"}, {"role": "user", "content": "{hello}"}]
    assert base.render(asked) == "short\n\n{hello}"


# ---------------------------------------------------------------- in chats


def test_a_chat_has_the_form_that_the_model_was_trained_with(tmp_path, tokenizer):
    own = Tokenizer(tokenizer.backend, tokenizer.template, tokenizer.end, tokenizer.pad, tokenizer.bos)
    own.prompt_format = WRAPPED
    own.save(tmp_path)
    served = Tokenizer.from_directory(tmp_path)
    assert served.prompt_format == WRAPPED
    asked = [{"role": "user", "content": QUESTION}]
    expected = own.prompt(
        [{"role": "system", "content": BRIEF}, {"role": "user", "content": "use 1 say 4 ? now"}]
    )
    assert _encode_chat(served, asked, False)[0].tolist() == expected.tolist()
    already = [{"role": "user", "content": "use 1 say 4 ? now"}]
    assert _encode_chat(served, already, False)[0].tolist() == expected.tolist()
    own_system = [{"role": "system", "content": "say"}, *asked]
    assert _encode_chat(served, own_system, False)[0].tolist() == own.prompt(own_system).tolist()


@pytest.mark.parametrize("text", ["[]", "{", '{"template": "x"}', '{"system": 1}', '{"other": "x"}'])
def test_a_broken_format_is_refused_in_one_sentence(tmp_path, tokenizer, text):
    tokenizer.save(tmp_path)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(LimbeckError, match=f"{FILE}: not a prompt format"):
        Tokenizer.from_directory(tmp_path)


def test_trained_models_keep_the_format_and_plain_ones_have_no_file(tmp_path, decoder, tokenizer):
    from limbeck.model import weights

    folder = tmp_path / "model"
    weights.save(decoder(), folder, tokenizer)
    tokenizer.save(folder)
    path = write(tmp_path, "use 1 {problem}", BRIEF)
    run = tiny.open_run(path, tmp_path / "runs")
    run.execute()
    nodes = run.graph.nodes
    for name in ("zero", "taught"):
        saved = json.loads((nodes[name].artifact.folder / "model" / FILE).read_text())
        assert saved == {"system": BRIEF, "template": "use 1 {problem}"}
    assert not (nodes["base"].artifact.folder / "model" / FILE).exists()
    released = release("formats/zero", tmp_path / "out", tmp_path / "runs", gguf="none").folder
    assert PromptFormat.from_directory(released) == PromptFormat(BRIEF, "use 1 {problem}")
    assert "System prompt: `say 1`" in (released / "README.md").read_text()
