"""The things that travel between the rooms: problems in, completions back, samples to learn from.

Nothing here knows torch. Legend of dimensions used all over the house:
N tokens of a packed batch · B rows · T positions · V vocabulary · H heads · K key/value heads · D head size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np


class LimbeckError(Exception):
    """A user's mistake, or a machine's limit: one sentence that names file, key and remedy.

    The command line prints it without a traceback and leaves with `exit_code`.
    """

    exit_code = 2


class Corrupted(LimbeckError):
    """A file in the store is not what its manifest says."""

    exit_code = 4


class Resumable(LimbeckError):
    """Stopped, nothing lost: the same command goes on from the last checkpoint."""

    exit_code = 75


class Message(TypedDict, total=False):
    """One turn: `{"role": "assistant", "content": "4", "reasoning_content": "2 and 2 make 4"}`."""

    role: str
    content: str
    reasoning_content: str


@dataclass(frozen=True)
class Problem:
    """What is asked, and what the verifier needs to judge an answer.

    >>> Problem("clock/156-3", "use 6 1 5 make 3?", answer=None, language="en", data={"numbers": [1, 5, 6]})
    """

    id: str
    prompt: str
    answer: str | None = None
    language: str = "en"
    origin: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """One sampled response. Tokens are kept as sampled and never re-tokenised.

    `Completion(tokens=[7, 9, 2], logprobs=[-.1, -.3, -.0], text="try 5", stopped=True, sample=0)`;
    `tokens` holds the end-of-turn token when `stopped`, `text` never does.
    `kept` holds, per token, the ids that top-p left to choose from (None where all were). `routes`
    [prompt + tokens - 1, layers, chosen] are the experts that each token met (None where there are none).
    A remote endpoint tells how many tokens there were and not which: then each is -1.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    stopped: bool
    sample: int
    kept: tuple[np.ndarray, ...] | None = None
    routes: np.ndarray | None = None


@dataclass(frozen=True)
class Score:
    """The named parts of a reward, a reason for each part that is zero, and what else was measured.

    `Score({"accuracy": 0.0, "format": 1.0}, {"accuracy": "answer 41, gold 42"}, {"attempts": 2.0}, "41")`.
    `answer` is what was extracted, for majority votes; empty where nothing was.
    `skipped` marks a problem whose gold answer cannot be read: never rewarded, always counted.
    """

    parts: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    answer: str = ""
    skipped: bool = False


@dataclass(frozen=True)
class Group:
    """All completions of one problem; `scores` and `rewards` are empty until a task has judged them."""

    problem: Problem
    prompt_tokens: np.ndarray
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...] = ()
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True)
class Labels:
    """What a teacher would have said in place of each learned token: its likeliest ids and their
    log-probabilities [tokens, K], and the log-probability of all other ids together [tokens].

    `Labels(np.array([[7, 9]]), np.log([[.6, .3]]), np.log([.1]))` labels one token.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One packed sequence to learn from.

    `tokens` is prompt + completion; the loss sees the tokens from `start` on, or those of them that are
    `learned` (one truth value each). RL fills the rest: `logprobs` as sampled (one per completion token),
    `advantage` one number for the sequence, `routes` the experts to meet again (one row per token but the
    last). Distillation fills `labels`, or across tokenizers the `spans` of text that learned tokens are parts
    of (-1: of none); preferences say of which `pair` a sample is the better (3) or the worse half (-3)."""

    tokens: np.ndarray
    start: int
    advantage: float = 0.0
    logprobs: np.ndarray | None = None
    reference: np.ndarray | None = None
    kept: tuple[np.ndarray, ...] | None = None
    learned: np.ndarray | None = None
    routes: np.ndarray | None = None
    labels: Labels | None = None
    spans: np.ndarray | None = None
    pair: int = 0


class Thought(NamedTuple):
    """A completion taken apart: what was thought, what was answered, and whether the tags were in order."""

    thought: str
    answer: str
    wellformed: bool


class Sampler(Protocol):
    """Whatever answers problems: the engine here, or any endpoint elsewhere."""

    def rollout(self, problems: Sequence[Problem], group_size: int, sampling: Any, seed: Any) -> list[Group]:
        """A group of completions for each problem."""


class Task(Protocol):
    """A source of problems with a judge of answers."""

    name: str

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of `train` or `test`; the two never share a problem's content."""

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Judge one completion; never raises for anything a model wrote."""


def fingerprint(*parts: Any) -> int:
    """A 63-bit number that is the same on every machine: the root of every random draw.

    >>> fingerprint("0/zero", 12, "clock/156-3", 4) == fingerprint("0/zero", 12, "clock/156-3", 4)
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: Any) -> np.random.Generator:
    """A counter-based generator keyed by what is drawn, never by when it is drawn."""
    return np.random.Generator(np.random.Philox(key=fingerprint(*parts)))
