"""The control "cut": responses that begin with an empty thought, and how they are read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import carry_out, open_run

from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.pipeline.stages.cut_thought import LONGEST, CutThought
from limbeck.run_log import read
from limbeck.tasks.answers import extract
from limbeck.types import Completion, Group, Problem

GREEDY = SamplingParams(0.0, 1.0, 40)
PROBLEM = Problem("sums/1", "What is 4 - 8?")


class Characters:
    """A tokenizer whose tokens are characters; the chat template may open the thought."""

    def __init__(self, generation: str = "A:"):
        self.generation = generation

    def render(self, messages):
        return self.generation

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, tokens):
        return "".join(chr(token) for token in tokens)


class Says:
    """An engine whose model writes the given text, and keeps the parameters that it was asked with."""

    def __init__(self, text: str, stopped: bool, tokenizer: Characters):
        self.text, self.stopped, self.tokenizer = text, stopped, tokenizer

    def rollout(self, problems, group_size, sampling, seed):
        self.sampling = sampling
        tokens = np.array(self.tokenizer.encode(self.text))
        said = Completion(tokens, np.zeros(len(tokens)), self.text, self.stopped, 0)
        return [Group(problem, tokens, (said,) * group_size) for problem in problems]


def cut(text: str, stopped: bool, style: str, generation: str = "A:") -> tuple[Completion, SimpleNamespace]:
    engine = Says(text, stopped, Characters(generation))
    (group,) = CutThought(engine, {"sums": style}).rollout([PROBLEM], 2, GREEDY, "seed")
    assert len(group.completions) == 2
    return group.completions[0], engine


@pytest.mark.parametrize(
    ("style", "begin"),
    [
        ("final", "<think> </think> The answer is"),
        ("boxed", "<think> </think> The answer is \\boxed{"),
        ("tags", "<think> </think> <answer>"),
    ],
)
def test_a_model_that_does_not_stop_is_judged_by_its_first_number(style, begin):
    said, engine = cut(" -4.</think> I think 12 and", False, style)
    assert "".join(map(chr, engine.sampling.response_prefix)) == begin
    assert engine.sampling.max_new_tokens == LONGEST
    assert said.text.startswith(f"{begin} -4") and said.stopped
    assert extract(said.text, style).answer == "-4"
    assert len(said.tokens) == len(" -4.</think> I think 12 and")


def test_a_model_that_stops_is_judged_by_all_that_it_wrote():
    said, _ = cut(" 4 or 5.", True, "final")
    assert said.text == "<think> </think> The answer is 4 or 5." and said.stopped
    assert extract(said.text, "final").answer is None


def test_without_a_number_the_response_ran_out_of_tokens():
    said, _ = cut(" not known to", False, "final")
    assert not said.stopped


def test_a_template_that_opens_the_thought_has_it_closed():
    said, _ = cut(" 7.", True, "final", "A:<think>\n")
    assert said.text == "</think> The answer is 7."


def test_a_response_prefix_belongs_to_the_prompt(decoder, tokenizer):
    """The completion is that of the longer prompt, and does not hold the prefix."""
    engine = Engine(decoder(), tokenizer)
    prefix = tuple(tokenizer.encode("<think> </think> <answer>"))
    problem = Problem("clock/1", "use 2 1 make 1 ?")
    sampling = SamplingParams(0.0, 1.0, 12, response_prefix=prefix)
    (group,) = engine.rollout([problem], 1, sampling, 0)
    prompt = np.concatenate([tokenizer.prompt(problem.prompt), prefix])
    assert group.prompt_tokens.tolist() == prompt.tolist()
    expected = list(engine.stream(prompt, SamplingParams(0.0, 1.0, 12), 0))
    said = [token for token in group.completions[0].tokens.tolist() if token != tokenizer.end_id]
    assert said == expected


RECIPE = """
name: own
licence: own
threads: 1
problems: {own: {source: files, path: own.jsonl, held_out: 6, licence: own, answer: final}}
stages:
  base: {kind: load, path: model}
  evaluation: {kind: evaluate, models: [base], without_thought: [base], problems: [own], prompts: 6,
               modes: [t1], max_new_tokens: 24}
"""


def test_an_evaluation_shows_the_model_with_its_thought_cut_off(tmp_path, decoder, tokenizer):
    weights.save(decoder(), tmp_path / "model", tokenizer)
    tokenizer.save(tmp_path / "model")
    rows = [{"question": f"say {i} ?", "answer": str(i % 3)} for i in range(20)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(RECIPE)
    nodes = carry_out(open_run(tmp_path / "own.yaml", tmp_path / "runs"), "cpu")
    plain, cut = (nodes[f"evaluation/{name}"].artifact for name in ("base", "base+cut"))
    assert plain.digest != cut.digest
    told = json.loads((cut.folder / "evaluation.json").read_text())
    assert (told["model"], told["control"]) == ("base", "cut")
    assert "own" in told["sources"]
    texts = [row["text"] for row in read(cut.folder / "samples.jsonl")]
    assert texts and all(text.startswith("<think> </think>") for text in texts)
