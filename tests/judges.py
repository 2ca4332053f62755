"""Samplers that answer a judge's prompts by program: one that really checks, and some that no one should
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
    """The texts between the prompt's marks, by name."""
    fenced = re.findall(r"(?s)(\[[0-9a-f]{16}\]) ([\w ]+)\n(.*?)\n\1 end of \2", prompt)
    return {name: text for _, name, text in fenced}


class Programmed:
    """A sampler whose completions are `reply(material, vote)`; `prompts` holds all prompts that it was
    given."""

    def __init__(self, reply: Callable[[Material, int], str], stopped: bool = True):
        self.reply = reply
        self.stopped = stopped
        self.prompts = []

    def rollout(self, problems: Sequence[Problem], group_size: int, sampling: Any, seed: Any) -> list[Group]:
        """A group of replies to each problem."""
        return [self._group(problem, group_size) for problem in problems]

    def _group(self, problem: Problem, size: int) -> Group:
        none = np.zeros(0)
        self.prompts.append(problem.prompt)
        shown = material(problem.prompt)
        completions = []
        for vote in range(size):
            completions.append(Completion(none, none, self.reply(shown, vote), self.stopped, vote))
        return Group(problem, none, tuple(completions))


def choosing(worth: Callable[[str, str], float]) -> Callable[[Material, int], str]:
    """A reply that prefers the response of more worth, by `worth(question, response)`."""

    def reply(shown: Material, vote: int) -> str:
        a = worth(shown["question"], shown["response A"])
        b = worth(shown["question"], shown["response B"])
        if a == b:
            return "verdict: tie"
        return "verdict: A" if a > b else "verdict: B"

    return reply


def truth(task) -> Callable[[str, str], float]:
    """A worth that really checks: 1 for a right answer of the miniature, wherever in the text it is, else
    0."""

    def worth(question: str, response: str) -> float:
        numbers, target = re.fullmatch(r"\w+ ([\d ]+) \w+ (\d+) \?", question).groups()
        data = {"numbers": sorted(map(int, numbers.split())), "target": int(target)}
        problem = Problem("clock/x", question, data=data)
        answer = re.search(r"<answer>.*?</answer>", response)
        text = answer[0] if answer else response
        completion = Completion(np.zeros(1), np.zeros(1), text, True, 0)
        return task.score(problem, completion).parts["accuracy"]

    return worth


def first(shown: Material, vote: int) -> str:
    """A reply that prefers the first response always."""
    return "verdict: A"


longer = choosing(lambda question, response: len(response))


def gullible(task, keys: Sequence[str] = CANARIES) -> Callable[[Material, int], str]:
    """A reply that checks, but takes an empty phrase for the best response."""
    check = truth(task)
    phrases = {key.strip() for key in keys}

    def worth(question: str, response: str) -> float:
        return 2.0 if response.strip() in phrases else check(question, response)

    return choosing(worth)
