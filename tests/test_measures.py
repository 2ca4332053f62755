"""What an evaluation measures beside accuracy: tokens of the thought, intervals, pass@8."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.eval.evaluate import measure
from limbeck.text.reasoning_parser import count_thought_tokens
from limbeck.types import Completion, Group, Problem, Score


class Pieces:
    """A tokenizer whose tokens are the indices of these pieces of text."""

    pieces = ("<think>", "</think>", "a ", "bc", "\n", "</", "think>4", "<think>a", "")

    def decode(self, tokens):
        return "".join(self.pieces[token] for token in tokens)

    def ids(self, *pieces: str) -> list[int]:
        return [self.pieces.index(piece) for piece in pieces]


TOKENIZER = Pieces()


@pytest.mark.parametrize(
    ("pieces", "opened", "count"),
    [
        (("<think>", "a ", "bc", "</think>", "a "), False, 2),
        (("<think>", "\n", "a ", "</think>", "a ", "bc"), False, 2),
        (("a ", "bc", "a ", "</think>", "bc"), True, 3),
        (("a ", "bc", "</think>"), False, 2),  # read as a thought, as `split_thought` does
        (("<think>", "a ", "bc"), False, 2),  # cut off inside the thought
        (("a ", "bc"), True, 2),
        (("a ", "bc"), False, 0),
        (("<think>", "</think>", "a "), False, 0),
        (("<think>", "\n", "</think>", "a "), False, 0),
        (("<think>a", "bc", "a ", "</", "think>4"), False, 2),  # tokens that are also part of a marker
        (("a ", "<think>", "bc", "</think>", "a "), False, 1),
        ((), True, 0),
    ],
)
def test_tokens_of_a_thought(pieces, opened, count):
    tokens = TOKENIZER.ids(*pieces)
    assert count_thought_tokens(TOKENIZER.decode(tokens), tokens, TOKENIZER, opened) == count


def test_the_thought_of_real_tokens_is_what_the_tokenizer_says(tokenizer):
    thought, answer = tokenizer.encode("try 5 + 1 = 6 yes"), tokenizer.encode("<answer> 5 + 1 </answer>")
    tokens = [*tokenizer.encode("<think>"), *thought, *tokenizer.encode("</think>"), *answer]
    assert count_thought_tokens(tokenizer.decode(tokens), tokens, tokenizer) == len(thought)


def completion(*pieces: str, stopped: bool = True) -> Completion:
    """A response; the end-of-turn token is the empty piece."""
    tokens = np.array(TOKENIZER.ids(*pieces, *([""] if stopped else [])))
    return Completion(tokens, np.zeros(len(tokens)), TOKENIZER.decode(tokens), stopped, 0)


def group(name: str, responses: list[tuple[Completion, Score]], prompt: str = "bc") -> Group:
    """A problem with its scored responses."""
    completions, scores = zip(*responses, strict=True)
    return Group(Problem(name, "ask"), np.array(TOKENIZER.ids(prompt)), completions, scores)


RIGHT = Score({"accuracy": 1.0, "format": 1.0, "language": 1.0})
WRONG = Score({"accuracy": 0.0, "format": 0.0, "language": 0.5})
MUTE = Score({"accuracy": 0.0, "format": 0.0})  # a response without words


def test_every_measure_has_its_interval_and_its_count():
    long = completion("<think>", "a ", "bc", "\n", "</think>", "a ")
    cut = completion("<think>", "a ", stopped=False)
    groups = [group("p0", [(long, RIGHT), (cut, MUTE)]), group("p1", [(cut, WRONG), (cut, WRONG)])]
    told = measure("t1", groups, TOKENIZER)["t1"]
    assert (told["length"], told["thought_length"]) == ((7 + 2 * 3) / 4, (3 + 1 * 3) / 4)
    assert (told["truncated"], told["format"]) == (0.75, 0.25)
    assert told["language_consistency"] == pytest.approx(2 / 3)
    for name, interval in told["intervals"].items():
        assert interval["mean"] == pytest.approx(told[name]), name
        assert interval["low"] <= interval["mean"] <= interval["high"]
        assert (interval["n"], interval["problems"]) == ((3 if name == "language_consistency" else 4), 2)
    assert set(told["intervals"]) == {
        "length", "thought_length", "truncated", "format", "language_consistency",
    }  # fmt: skip
    assert "pass@8" not in told


def test_what_nobody_measured_has_no_interval():
    told = measure("greedy", [group("p0", [(completion("a "), MUTE)])], TOKENIZER)["greedy"]
    assert told["language_consistency"] is None and "language_consistency" not in told["intervals"]
    assert told["intervals"]["length"] is None, "one problem says nothing of the spread"


def test_a_prompt_that_opens_the_thought():
    told = measure("t1", [group("p0", [(completion("a ", "bc"), MUTE)], prompt="<think>")], TOKENIZER)
    assert told["t1"]["thought_length"] == 2


@pytest.mark.parametrize(("right", "share"), [(0, 0.0), (1, 8 / 10), (3, 1.0)])
def test_pass_at_8_from_plain_samples(right, share):
    """10 responses of which 1 is right: 8 of them miss it with probability 2/10."""
    said = completion("a ")
    responses = [(said, RIGHT)] * right + [(said, WRONG)] * (10 - right)
    told = measure("t06", [group("p0", responses), group("p1", responses)], TOKENIZER)["t06"]
    assert told["pass@8"]["mean"] == pytest.approx(share) and told["pass@8"]["problems"] == 2
    assert told["accuracy"]["mean"] == right / 10
