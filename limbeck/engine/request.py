"""A request to a served model, and its output, to which tokens are added as they are sampled."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..types import LimbeckError

Top = tuple[tuple[int, float], ...]  # the most likely tokens at one position, with their log-probabilities


class QueueFull(LimbeckError):
    """Raised when the queue already holds its maximum of `waiting` requests; the client should try again
    after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class DeviceFull(LimbeckError):
    """The error of a request for which the memory of the device did not suffice. `shortage` says what was
    asked of it and what there was."""

    exit_code = 75

    def __init__(self, shortage: str):
        self.shortage = shortage
        super().__init__(f"{shortage}; ask for fewer tokens, or again when other requests have ended")


@dataclass(frozen=True)
class Request:
    """A prompt (token ids) with its sampling parameters, for instance `Request(np.array([1, 7, 45]),
    temperature=0.6, top_p=0.95, max_new_tokens=512, seed=3)`.

    `copies` sequences are sampled, each with its own random numbers. A thought (the reasoning before the
    answer) that is still open after `thought_budget` tokens is closed; `opened` is True if the prompt ends
    inside a thought. With `top` set, log-probabilities at temperature 1 are returned for the sampled tokens
    and for the `top` most likely tokens at each position; with `echo`, for the prompt's tokens as well. With
    `ignore_eos` sequences are sampled past the end-of-turn token. `top_k`, `min_p` and the penalties are
    those of `SamplingParams`.
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
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


class Choice:
    """The output of one sequence of a request. Sampled tokens, including the end-of-turn token, are appended
    to `tokens`; `logprobs` and `tops` are filled if the request sets `top`.

    `finish` is "" until the sequence has ended, then "stop" or "length". A client sets `enough` to True to
    end the sequence early.
    """

    __slots__ = ("enough", "finish", "logprobs", "tokens", "tops")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[Top] = []
        self.finish = ""
        self.enough = False


class Answer:
    """The output of a request so far, with one `Choice` per sequence. Only the engine's thread writes to it;
    any thread may read it, since its lists only grow.

    `cached` is the number of prompt tokens whose KV came from the prefix cache. If the request sets `echo`,
    `prompt_logprobs` and `prompt_tops` have one entry for each prompt token but the first. `error` is the
    exception if the model failed. `asked`, `first` and `ended` are the times of the request's arrival, its
    first token and its end, in seconds of the monotonic clock (0: not yet).
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
        """True once all sequences have ended, or the request has failed or was cancelled."""
        return self.ended > 0
