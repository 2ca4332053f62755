"""Samplers that answer a judge's prompts by programme: one that really checks, and some that nobody should
trust."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from limbeck.eval.judge_calibration import CANARIES
from limbeck.types import Completion, Group, Problem

Material = dict[str, str]  # question, response A, response B ...


def material(prompt: str) -> Material:
    """What stands between the marks, by name."""
    return {
        name: text
        for _, name, text in re.findall(r"(?s)(\[[0-9a-f]{16}\]) ([\w ]+)\n(.*?)\n\1 end of \2", prompt)
    }


class Programmed:
    """A sampler whose `reply(material, vote)` is what it says; `prompts` are those that it was asked."""

    def __init__(self, reply: Callable[[Material, int], str], stopped: bool = True):
        self.reply, self.stopped, self.prompts = reply, stopped, []

    def rollout(self, problems: Sequence[Problem], group_size: int, sampling: Any, seed: Any) -> list[Group]:
        none = np.zeros(0)
        self.prompts += [problem.prompt for problem in problems]
        return [
            Group(
                p,
                none,
                tuple(
                    Completion(none, none, self.reply(material(p.prompt), i), self.stopped, i)
                    for i in range(group_size)
                ),
            )
            for p in problems
        ]


def choosing(worth: Callable[[str, str], float]) -> Callable[[Material, int], str]:
    """Prefers the response of more worth; `worth(question, response)`."""

    def reply(given: Material, vote: int) -> str:
        a, b = (worth(given["question"], given[f"response {name}"]) for name in "AB")
        return f"verdict: {'A' if a > b else 'B' if b > a else 'tie'}"

    return reply


def truth(task) -> Callable[[str, str], float]:
    """Really checks: 1 for a right answer of the miniature, wherever in the text it stands alone, else 0."""

    def worth(question: str, response: str) -> float:
        numbers, target = re.fullmatch(r"\w+ ([\d ]+) \w+ (\d+) \?", question).groups()
        problem = Problem(
            "clock/x", question, data={"numbers": sorted(map(int, numbers.split())), "target": int(target)}
        )
        found = re.search(r"<answer>.*?</answer>", response)
        return task.score(
            problem, Completion(np.zeros(1), np.zeros(1), found[0] if found else response, True, 0)
        ).parts["accuracy"]

    return worth


def first(given: Material, vote: int) -> str:
    """Prefers whatever stands first."""
    return "verdict: A"


longer = choosing(lambda question, response: len(response))


def gullible(task, keys: Sequence[str] = CANARIES) -> Callable[[Material, int], str]:
    """Checks, but takes a response that says nothing for the best one can say."""
    check = truth(task)
    return choosing(
        lambda question, response: (
            2.0 if response.strip() in map(str.strip, keys) else check(question, response)
        )
    )
