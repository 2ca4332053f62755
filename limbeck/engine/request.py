"""What is asked of a model that serves many at once, and the answers as they grow."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..types import LimbeckError

Top = tuple[tuple[int, float], ...]  # the likeliest tokens at one place, with their log-probabilities


class Full(LimbeckError):
    """More wait already than the server lets wait; come back in `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Request:
    """`Request(np.array([1, 7, 45]), temperature=0.6, top_p=0.95, max_new_tokens=512, seed=3)`.

    `copies` rows answer it, each with draws of its own. A thought that is still open after `thought_budget` tokens
    is closed; `opened` says that the prompt ends inside one already. `top` asks for the log-probabilities (at
    temperature 1) of what was sampled and of so many of the likeliest tokens beside it, `echo` for those of the
    prompt too. `endless` rows go on after the end of turn.
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
    endless: bool = False


class Choice:
    """One of a request's rows: tokens are appended as they are sampled, the end of turn included; `finish` is set
    after the last one, to "stop" or "length". Who sets `enough` wants no more."""

    __slots__ = ("enough", "finish", "logprobs", "tokens", "tops")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[Top] = []
        self.finish = ""
        self.enough = False


class Answer:
    """What has been said to a request so far. One thread writes, any may read: lists only grow.

    `cached` counts the tokens of the prompt that were not computed again; `prompt_logprobs` and `prompt_tops` have
    one entry for each token of an echoed prompt but its first. `error` is set if the model failed.
    """

    def __init__(self, request: Request):
        self.request = request
        self.choices = [Choice() for _ in range(request.copies)]
        self.cached = 0
        self.prompt_logprobs: list[float] = []
        self.prompt_tops: list[Top] = []
        self.error: Exception | None = None
        self.cancelled = False
        self.asked, self.first, self.ended = time.monotonic(), 0.0, 0.0

    @property
    def done(self) -> bool:
        return self.ended > 0
