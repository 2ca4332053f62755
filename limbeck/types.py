"""The data types that the parts of the package exchange: problems, completions, scores, and samples to learn
from.

This module does not import torch. Dimension letters used throughout the package, unless a module defines its
own: N tokens of a packed batch · B rows · T positions · V vocabulary · H heads · K key/value heads · D head
size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np


class LimbeckError(Exception):
    """An error that the user can resolve: a mistake, or a limit of the machine. Its message is one sentence
    that names the file, the key and the remedy.

    The command line prints the message without a traceback and exits with `exit_code`."""

    exit_code = 2


class Corrupted(LimbeckError):
    """A file in the store (the folder of all finished artifacts) differs from what its manifest says."""

    exit_code = 4


class Resumable(LimbeckError):
    """The run was stopped without losing anything: the same command continues from the last checkpoint."""

    exit_code = 75


class Message(TypedDict, total=False):
    """One message of a conversation, for example:

    `{"role": "assistant", "content": "4", "reasoning_content": "2 and 2 make 4"}`."""

    role: str
    content: str
    reasoning_content: str


@dataclass(frozen=True)
class Problem:
    """A problem: the question, and the data that the verifier needs to judge an answer.

    `id` begins with the name of the source. `answer` is the reference answer, None where the verifier
    computes correctness from `data`. `origin` says where the problem comes from. `prompt` is the user
    message, made from the question and `template`; `system` is the system prompt, empty if there is none.

    >>> Problem("clock/156-3", "use 6 1 5 make 3?", answer=None, language="en", data={"numbers": [1, 5, 6]})
    """

    id: str
    prompt: str
    answer: str | None = None
    language: str = "en"
    origin: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    template: str = "{problem}"


@dataclass(frozen=True)
class Completion:
    """One sampled response. Its token ids are kept as they were sampled; the text is never tokenized again.

    `Completion(tokens=[7, 9, 2], logprobs=[-.1, -.3, -.0], text="try 5", stopped=True, sample=0)`.

    `stopped` is True if the response ended by itself, False if it reached the token limit. If `stopped`, the
    last of the `tokens` is the end-of-turn token, which `text` never contains. `logprobs` is the
    log-probability of each token at sampling. `sample` is the index of the completion in its group. `kept`
    holds, for each token, the ids that top-p sampling left to choose from; None where no id was excluded.
    `routes` [prompt + tokens - 1, layers, experts per token] are the experts chosen for each input token;
    None for a model without experts. A remote endpoint reports only the number of tokens; each token id is
    then -1."""

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    stopped: bool
    sample: int
    kept: tuple[np.ndarray, ...] | None = None
    routes: np.ndarray | None = None


@dataclass(frozen=True)
class Score:
    """The score of one completion: the named parts of its reward, a reason for a part that is zero, and
    other statistics.

    `Score({"accuracy": 0.0, "format": 1.0}, {"accuracy": "answer 41, gold 42"}, {"attempts": 2.0}, "41")`.
    `answer` is the answer that was extracted from the completion, used for majority votes; empty if there
    was none. `skipped` is True if the reference answer of the problem cannot be read: the completion then
    gets no reward, and is still counted in statistics."""

    parts: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    answer: str = ""
    skipped: bool = False


@dataclass(frozen=True)
class Group:
    """A problem with all its completions. `scores` and `rewards` have one entry for each completion, and are
    empty until the completions have been scored."""

    problem: Problem
    prompt_tokens: np.ndarray
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...] = ()
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True)
class Labels:
    """A teacher's distribution at each token in the loss: the most probable token ids and their
    log-probabilities, each [tokens, K], and the log-probability of all other ids together [tokens].

    `Labels(np.array([[7, 9]]), np.log([[.6, .3]]), np.log([.1]))` labels one token: the teacher gives id 7 a
    probability of 0.6, id 9 one of 0.3, and all other ids 0.1."""

    ids: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One token sequence to learn from.

    `tokens` is the prompt followed by the completion. The loss includes the tokens from index `start` on or,
    if `learned` is given (a boolean for each of these tokens), those for which it is True.

    Fields for RL: `logprobs` at sampling (one for each completion token), `advantage` (one number for the
    sequence), `kept` (the ids that top-p sampling left, for each token), and `routes` (the experts chosen at
    sampling, to be used again; one row for each token but the last). `reference` holds log-probabilities of
    a reference model or a teacher.

    Fields for distillation: `labels` or, where the tokenizers differ, `spans`: the number of the span of
    text that each token in the loss is in, -1 for none. Field for preference pairs: `pair` is, for example,
    3 for the chosen and -3 for the rejected response of pair 3, and 0 for a sample without a pair."""

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
    """The parts of a completion: the text of the thought, the text of the answer, and whether the tags that
    mark the thought were well formed."""

    thought: str
    answer: str
    wellformed: bool


class Sampler(Protocol):
    """Anything that samples completions for problems: the engine of this package, or a remote endpoint."""

    def rollout(self, problems: Sequence[Problem], group_size: int, sampling: Any, seed: Any) -> list[Group]:
        """Sample a group of `group_size` completions for each problem. `sampling` are the sampling
        parameters. The engine of this package gives the same completions for the same seed; a remote
        endpoint may not."""


class Task(Protocol):
    """A source of problems that also scores answers."""

    name: str

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of the split `train` or `test`. The two splits have no problem in common."""

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Score one completion. No text of a completion, however malformed, makes it raise an exception."""


def fingerprint(*parts: Any) -> int:
    """Return a 63-bit number computed from `parts`, the same on every machine. All random draws are seeded
    with such a number.

    >>> fingerprint("0/zero", 12, "clock/156-3", 4) == fingerprint("0/zero", 12, "clock/156-3", 4)
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: Any) -> np.random.Generator:
    """Return a random generator whose draws depend only on `parts`, which name what is drawn, and not on the
    draws made before."""
    return np.random.Generator(np.random.Philox(key=fingerprint(*parts)))
