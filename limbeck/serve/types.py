"""Types of the service: a served model, generation options, deltas and complete outputs.

A request has one or more choices: independent outputs for the same prompt. A delta is a piece of one choice.
Shapes: N tokens of a prompt.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..engine.request import Request, Top
from ..engine.scheduler import Scheduler
from ..model.config import ModelConfig
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError

SEED_BITS = 53  # bits of a drawn seed: the largest integers that JSON numbers hold exactly


@dataclass(frozen=True)
class Price:
    """The price of a million prompt tokens and of a million completion tokens: `Price(0.15, 0.6)`.

    The currency is left to the operator of the server.
    """

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the price of one request with these numbers of tokens, in the currency of the price."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Usage:
    """Token counts, cost and latency of one request: `Usage(12, 8, 90, 70)`.

    `cached_tokens` are prompt tokens that were not computed again; `reasoning_tokens` are part of
    `completion_tokens`. `cost` is in the currency of the model's price, None without a price.
    `seconds_to_first` is the time from the submission to the first token, and `seconds` the time to the end.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cost: float | None = None
    seconds_to_first: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """A sampled token, its log-probability at temperature 1, and the likeliest tokens at its position.

    `TokenLogprob(48, -0.02, ((48, -0.02), (56, -4.1)))`: `top` has pairs of token id and log-probability.
    """

    token: int
    logprob: float
    top: Top


@dataclass(frozen=True)
class Delta:
    """The next piece of a streamed output: `Delta("thought", "try 5", tokens=2)`.

    `kind` is "thought", "answer" or "end", and `choice` the number of the choice. The last delta of each
    choice is of kind "end" and has `finish`: "stop" or "length". The last delta of the request has `usage`.
    `tokens` is a count. `text` comes from the model and must be sanitized before a browser renders it.
    """

    kind: str
    text: str = ""
    tokens: int = 0
    choice: int = 0
    finish: str = ""
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class ChatOutput:
    """One complete choice: `ChatOutput("5 -1 -6", "try 5 ...", "stop", usage)`.

    `finish` is "stop" or "length" (cut at the token limit). `logprobs` belong to the answer,
    `thought_logprobs` to the thought; they are empty unless requested.
    """

    answer: str
    thought: str
    finish: str
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    thought_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class GenerationOptions:
    """Sampling options of one request.

    `n` is the number of choices. A `max_tokens` of None stands for the server's default, a `seed` of None for
    a random seed. `thought_budget` is the limit of the thought in tokens, None for no limit. `top_logprobs`
    is the number of likeliest tokens returned beside each sampled token, None for no log-probabilities.
    `echo` asks for the log-probabilities of the prompt. `ignore_eos` generates on after an end-of-turn token.
    `plain` output is not split into thought and answer. `top_k`, `min_p` and the penalties are those of the
    engine's `SamplingParams`.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int | None = None
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    thought_budget: int | None = None
    top_logprobs: int | None = None
    echo: bool = False
    ignore_eos: bool = False
    plain: bool = False
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(eq=False)
class ServedModel:
    """A model under the name by which clients request it, with its scheduler and price.

    `folder` is the model's directory, and `created` the Unix time of its loading. `default_max_tokens` limits
    the completion of a request that sets no limit.
    """

    name: str
    folder: Path
    scheduler: Scheduler
    price: Price | None = None
    default_max_tokens: int = 2048
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model."""
        return self.scheduler.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.scheduler.tokenizer

    @property
    def rows(self) -> int:
        """The greatest number of sequences that are generated at once."""
        return self.scheduler.rows

    @property
    def busy(self) -> int:
        """The number of sequences that are being prefilled or generated now."""
        return self.scheduler.busy

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return len(self.scheduler.line)

    def request(self, prompt: np.ndarray, options: GenerationOptions, opened: bool = False) -> Request:
        """Return the engine's request for a prompt of token ids [N].

        `opened` is True if the prompt ends inside a thought. Raises LimbeckError if the options set no limit
        and the prompt fills all positions of the model.
        """
        return Request(
            prompt,
            options.temperature,
            options.top_p,
            self._max_tokens(len(prompt), options),
            options.n,
            _seed(options),
            options.thought_budget,
            opened,
            options.top_logprobs,
            options.echo,
            options.ignore_eos,
            options.top_k,
            options.min_p,
            options.presence_penalty,
            options.frequency_penalty,
            options.repetition_penalty,
        )

    def _max_tokens(self, prompt_tokens: int, options: GenerationOptions) -> int:
        """Return the greatest number of tokens in the completion.

        Without a limit in the options, it is the server's default or the number of positions that the prompt
        leaves, whichever is smaller. Raises LimbeckError if the prompt leaves none.
        """
        if options.max_tokens is not None:
            return options.max_tokens
        positions = self.config.max_positions
        if prompt_tokens >= positions:
            raise LimbeckError(
                f"the prompt has {prompt_tokens} tokens, and {self.name} has only {positions} positions"
            )
        return min(positions - prompt_tokens, self.default_max_tokens)


def _seed(options: GenerationOptions) -> int:
    """Return the seed in the options, or a random one if there is none."""
    if options.seed is None:
        return secrets.randbits(SEED_BITS)
    return options.seed
