"""A request to a served model, and its output, which grows as tokens are sampled."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..types import LimbeckError

Top = tuple[tuple[int, float], ...]  # the most likely tokens at one position, with their log-probabilities


class QueueFull(LimbeckError):
    """The queue is full; try again in `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Request:
    """`Request(np.array([1, 7, 45]), temperature=0.6, top_p=0.95, max_new_tokens=512, seed=3)`.

    `copies` sequences are sampled, each from random numbers of its own. A thought that is still open after
    `thought_budget` tokens is closed; `opened` means that the prompt ends inside a thought. `top` asks for
    the log-probabilities (at temperature 1) of the sampled tokens and of the `top` most likely ones in each
    place, `echo` for those of the prompt too. With `ignore_eos` sequences go on after the end of turn.
    """

    prompt: np.ndarray
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 160
    copies: int = 1
    seed: int = 0
    thought_budget: int | None = None
    opened: bool = False
    top: int | None = None
    echo: bool = False
    ignore_eos: bool = False


class Choice:
    """The output of one sequence: tokens are appended as they are sampled, the end of turn included. `finish`
    is set after the last one, to "stop" or "length". A client sets `enough` to stop the sequence before
    that."""

    __slots__ = ("enough", "finish", "logprobs", "tokens", "tops")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[Top] = []
        self.finish = ""
        self.enough = False


class Answer:
    """The output of a request so far. One thread writes, any may read: lists only grow.

    `cached` counts the tokens of the prompt whose KV came from the prefix cache; `prompt_logprobs` and
    `prompt_tops` have one entry for each token of an echoed prompt but its first. `error` is set if the model
    failed. `asked`, `first` and `ended` are the times of arrival, of the first token and of the end (seconds,
    monotonic; 0 for not yet).
    """

    def __init__(self, request: Request):
        self.request = request
        self.choices = [Choice() for _ in range(request.copies)]
        self.cached = 0
        self.prompt_logprobs: list[float] = []
        self.prompt_tops: list[Top] = []
        self.error: Exception | None = None
        self.cancelled = False
        self.asked = time.monotonic()
        self.first = 0.0
        self.ended = 0.0

    @property
    def done(self) -> bool:
        """True once all sequences have ended, or the request has failed or was aborted."""
        return self.ended > 0
