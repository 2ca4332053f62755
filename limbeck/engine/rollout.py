"""Rollouts: each prompt prefilled once and forked into its group, finished rows dropped, new ones let in.

Outputs never depend on what runs side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..text.tokenizer import Tokenizer
from ..types import Completion, Group, LimbeckError, Problem, generator
from .decode_batch import DecodeBatch, Row
from .sampling import SamplingParams
from .speculative import Speculation


class Engine:
    """Samples from a decoder. `rows` bounds how many sequences are in flight at once.

    `speculate` lets the module that looks ahead draft every second token: the same tokens in fewer steps, where
    it guesses well. `drafted` and `accepted` count how well.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, rows: int = 256, speculate: bool = False):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        if speculate and not model.ahead:
            raise LimbeckError(
                "speculate: the model has no module that looks ahead (num_nextn_predict_layers is 0)"
            )
        self.speculate, self.drafted, self.accepted = speculate, 0, 0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that the model would have sampled itself."""
        return self.accepted / max(1, self.drafted)

    def bill(self) -> dict[str, float]:
        """What is worth telling of the rollouts since the last bill: how many drafts were the model's own choice."""
        told = {"accepted_drafts": self.acceptance} if self.speculate else {}
        self.drafted = self.accepted = 0
        return told

    def _flight(self, sampling: SamplingParams) -> DecodeBatch:
        return (Speculation if self.speculate else DecodeBatch)(self.model, self.tokenizer.end_id, sampling)

    def _land(self, flight: DecodeBatch) -> None:
        self.drafted, self.accepted = self.drafted + flight.drafted, self.accepted + flight.accepted

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take new weights; those that share memory with the learner's are there already."""
        for name, mine in self.model.state_dict().items():
            if mine.data_ptr() != weights[name].data_ptr():
                mine.copy_(weights[name])

    @torch.no_grad()
    def rollout(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        seed: object,
        progress: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """`group_size` completions of every problem, in the problems' order; `progress` is told of each finished one."""
        prompts = [self.tokenizer.prompt(problem.prompt) for problem in problems]
        for problem, prompt in zip(problems, prompts, strict=True):
            self._check_room(f"problem {problem.id}", prompt, sampling)
        waiting = deque(range(len(problems)))
        flight = self._flight(sampling)
        done: list[list[Completion | None]] = [[None] * group_size for _ in problems]
        while waiting or flight.busy:
            free = self.rows - flight.busy
            if waiting and (free >= min(group_size, self.rows) or not flight.busy):
                admitted = [waiting.popleft() for _ in range(min(len(waiting), max(1, free // group_size)))]
                uniforms = [self._uniforms(problems[i], group_size, sampling, seed) for i in admitted]
                flight.admit([(i, prompts[i]) for i in admitted], np.concatenate(uniforms), group_size)
            for i, sample, row in flight.step():
                done[i][sample] = self._completion(sample, row, flight.ends)
                if progress:
                    progress(1)
        self._land(flight)
        return [Group(p, q, tuple(c)) for p, q, c in zip(problems, prompts, done, strict=True)]

    @torch.no_grad()
    def stream(self, prompt: np.ndarray, sampling: SamplingParams, seed: object) -> Iterator[int]:
        """One completion, token by token, the end-of-turn token left out."""
        self._check_room("the question", prompt, sampling)
        flight = self._flight(sampling)
        uniforms = generator(seed, "stream").random((1, sampling.max_new_tokens))
        flight.admit([(0, prompt)], uniforms, 1)
        sent = 0
        while flight.busy:
            finished = flight.step()
            tokens = finished[0][2].tokens if finished else flight.tokens_BT[0, : flight.age_B[0]]
            for token in tokens[sent:]:
                if int(token) not in flight.ends:
                    yield int(token)
            sent = len(tokens)

    def _uniforms(
        self, problem: Problem, group_size: int, sampling: SamplingParams, seed: object
    ) -> np.ndarray:
        shape = sampling.max_new_tokens
        return np.stack([generator(seed, problem.id, sample).random(shape) for sample in range(group_size)])

    def _completion(self, sample: int, row: Row, ends: set[int]) -> Completion:
        stopped = int(row.tokens[-1]) in ends
        return Completion(
            row.tokens, row.logprobs, self.tokenizer.decode(row.tokens), stopped, sample, row.kept, row.routes
        )

    def _check_room(self, name: str, prompt: np.ndarray, sampling: SamplingParams) -> None:
        room = self.model.config.max_positions
        if len(prompt) + sampling.max_new_tokens > room:
            raise LimbeckError(
                f"{name}: {len(prompt)} prompt tokens and max_new_tokens={sampling.max_new_tokens} "
                f"exceed the model's {room} positions; lower max_new_tokens or ask less"
            )
