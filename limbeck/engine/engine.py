"""Rollouts: each prompt prefilled once and forked into its group, finished rows dropped, new ones let in.

B rows in flight · T tokens of a completion · V vocabulary. Outputs never depend on what runs side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.cache import KVCache, Packed
from ..model.decoder import Decoder
from ..tokenizer import Tokenizer
from ..types import Completion, Group, LimbeckError, Problem, generator
from .sampling import SamplingParams, draw

COMPACT = 0.75  # drop finished rows when fewer than this share is alive: copying costs, so do idle rows


class Engine:
    """Samples from a decoder. `rows` bounds how many sequences are in flight at once."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, rows: int = 256):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take new weights; those that share memory with the learner's are there already."""
        for name, mine in self.model.state_dict().items():
            if mine.data_ptr() != weights[name].data_ptr():
                mine.copy_(weights[name])

    @torch.no_grad()
    def rollout(
        self, problems: Sequence[Problem], group_size: int, sampling: SamplingParams, seed: object,
        progress: Callable[[int], None] | None = None,
    ) -> list[Group]:  # fmt: skip
        """`group_size` completions of every problem, in the problems' order; `progress` is told of each finished one."""
        prompts = [self.tokenizer.prompt(problem.prompt) for problem in problems]
        for problem, prompt in zip(problems, prompts, strict=True):
            self._check_room(f"problem {problem.id}", prompt, sampling)
        waiting = deque(range(len(problems)))
        flight = _Flight(self.model, self.tokenizer.end_id, sampling)
        done: list[list[Completion | None]] = [[None] * group_size for _ in problems]
        while waiting or flight.busy:
            free = self.rows - flight.busy
            if waiting and (free >= min(group_size, self.rows) or not flight.busy):
                admitted = [waiting.popleft() for _ in range(min(len(waiting), max(1, free // group_size)))]
                uniforms = [self._uniforms(problems[i], group_size, sampling, seed) for i in admitted]
                flight.admit([(i, prompts[i]) for i in admitted], np.concatenate(uniforms), group_size)
            for i, sample, row in flight.step():
                done[i][sample] = self._completion(sample, row)
                if progress:
                    progress(1)
        return [Group(p, q, tuple(c)) for p, q, c in zip(problems, prompts, done, strict=True)]

    @torch.no_grad()
    def stream(self, prompt: np.ndarray, sampling: SamplingParams, seed: object) -> Iterator[int]:
        """One completion, token by token, the end-of-turn token left out."""
        self._check_room("the question", prompt, sampling)
        flight = _Flight(self.model, self.tokenizer.end_id, sampling)
        uniforms = generator(seed, "stream").random((1, sampling.max_new_tokens))
        flight.admit([(0, prompt)], uniforms, 1)
        sent = 0
        while flight.busy:
            finished = flight.step()
            tokens = finished[0][2].tokens if finished else flight.tokens_BT[0, : flight.age_B[0]].numpy()
            for token in tokens[sent:]:
                if token != self.tokenizer.end_id:
                    yield int(token)
            sent = len(tokens)

    def _uniforms(self, problem: Problem, group_size: int, sampling: SamplingParams, seed: object) -> np.ndarray:
        shape = sampling.max_new_tokens
        return np.stack([generator(seed, problem.id, sample).random(shape) for sample in range(group_size)])

    def _completion(self, sample: int, row: _Row) -> Completion:
        stopped = int(row.tokens[-1]) == self.tokenizer.end_id
        return Completion(row.tokens, row.logprobs, self.tokenizer.decode(row.tokens), stopped, sample, row.kept)

    def _check_room(self, name: str, prompt: np.ndarray, sampling: SamplingParams) -> None:
        room = self.model.config.max_positions
        if len(prompt) + sampling.max_new_tokens > room:
            raise LimbeckError(
                f"{name}: {len(prompt)} prompt tokens and max_new_tokens={sampling.max_new_tokens} "
                f"exceed the model's {room} positions; lower max_new_tokens or ask less"
            )


@dataclass(frozen=True)
class _Row:
    tokens: np.ndarray
    logprobs: np.ndarray
    kept: tuple[np.ndarray, ...] | None


class _Flight:
    """The rows in flight: their cache, what they have said, and who they are."""

    def __init__(self, model: Decoder, end: int, sampling: SamplingParams):
        weight = model.embed.weight
        self.model, self.end, self.sampling = model, end, sampling
        self.cache = KVCache(model.config, weight.dtype, weight.device)
        budget = sampling.max_new_tokens
        self.tokens_BT = torch.zeros(0, budget, dtype=torch.long)
        self.logprobs_BT = torch.zeros(0, budget, dtype=weight.dtype)
        self.uniforms_BT = torch.zeros(0, budget, dtype=torch.float64)
        self.age_B = torch.zeros(0, dtype=torch.long)
        self.alive_B = torch.zeros(0, dtype=torch.bool)
        self.owners: list[tuple[int, int]] = []
        self.kept: list[list[np.ndarray]] = []
        self.hidden_BC: Tensor | None = None

    @property
    def busy(self) -> int:
        return len(self.owners)

    def admit(self, prompts: list[tuple[int, np.ndarray]], uniforms: np.ndarray, copies: int) -> None:
        """Prefill prompts, shortest first so that attention pads little, and fork each into `copies` rows."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))
        lengths = [len(prompts[i][1]) for i in order]
        prefill = Packed(lengths).keep()
        tokens_N = torch.from_numpy(np.concatenate([prompts[i][1] for i in order]))
        hidden_NC = self.model(tokens_N, prefill)
        last_C = hidden_NC[torch.tensor(lengths).cumsum(0) - 1].repeat_interleave(copies, 0)
        self.cache.fork(prefill, [copies] * len(order))
        rows = torch.tensor([i * copies + c for i in order for c in range(copies)])
        fresh = len(rows)
        self.hidden_BC = last_C if self.hidden_BC is None or not self.busy else torch.cat([self.hidden_BC, last_C])
        self.tokens_BT = torch.cat([self.tokens_BT, self.tokens_BT.new_zeros(fresh, self.tokens_BT.shape[1])])
        self.logprobs_BT = torch.cat([self.logprobs_BT, self.logprobs_BT.new_zeros(fresh, self.logprobs_BT.shape[1])])
        self.uniforms_BT = torch.cat([self.uniforms_BT, torch.from_numpy(uniforms)[rows]])
        self.age_B = torch.cat([self.age_B, self.age_B.new_zeros(fresh)])
        self.alive_B = torch.cat([self.alive_B, self.alive_B.new_ones(fresh)])
        self.owners += [(prompts[i][0], c) for i in order for c in range(copies)]
        self.kept += [[] for _ in range(fresh)]

    def step(self) -> list[tuple[int, int, _Row]]:
        """Sample one token a row, hand back the finished rows, and run the rest one token further."""
        tokens_B = self._sample()
        ended_B = (tokens_B == self.end) | (self.age_B >= self.sampling.max_new_tokens)
        ended_B &= self.alive_B
        finished = [self._row(i) for i in ended_B.nonzero().flatten().tolist()] if ended_B.any() else []
        self.alive_B &= ~ended_B
        alive = int(self.alive_B.sum())
        if alive < COMPACT * len(self.owners):
            tokens_B = self._drop(tokens_B)
        if alive:
            self.cache.rest(~self.alive_B)
            self.cache.advance()
            self.hidden_BC = self.model(tokens_B, self.cache)
        return finished

    def _sample(self) -> Tensor:
        rows, age = torch.arange(len(self.owners)), self.age_B.clamp(max=self.tokens_BT.shape[1] - 1)
        previous_B = self.tokens_BT[rows, (age - 1).clamp(min=0)]
        logits_BV = F.linear(self.hidden_BC, self.model.head.weight)
        chosen = draw(logits_BV, self.uniforms_BT[rows, age], previous_B, self.sampling)
        self.tokens_BT[rows, age] = chosen.tokens_B
        self.logprobs_BT[rows, age] = chosen.logprobs_B
        if chosen.kept_BV is not None:
            for row, kept_V in zip(self.kept, chosen.kept_BV, strict=True):
                row.append(kept_V.nonzero().flatten().numpy())
        self.age_B = age + 1
        return chosen.tokens_B

    def _row(self, i: int) -> tuple[int, int, _Row]:
        age = int(self.age_B[i])
        kept = tuple(self.kept[i][:age]) if self.kept[i] else None
        row = _Row(self.tokens_BT[i, :age].numpy().copy(), self.logprobs_BT[i, :age].float().numpy().copy(), kept)
        return (*self.owners[i], row)

    def _drop(self, tokens_B: Tensor) -> Tensor:
        rows = self.alive_B.nonzero().flatten()
        self.cache.keep(rows)
        self.tokens_BT, self.logprobs_BT = self.tokens_BT[rows], self.logprobs_BT[rows]
        self.uniforms_BT, self.age_B = self.uniforms_BT[rows], self.age_B[rows]
        self.alive_B = self.alive_B[rows]
        self.owners = [self.owners[i] for i in rows.tolist()]
        self.kept = [self.kept[i] for i in rows.tolist()]
        return tokens_B[rows]
