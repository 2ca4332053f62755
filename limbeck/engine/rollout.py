"""Rollouts: each prompt is prefilled once and forked into the completions of its group. During decoding,
finished rows are dropped and new problems are admitted. A row is one sequence that is being sampled.

A completion does not depend on which other rows are in the batch. Dimensions: N tokens of a prompt · B rows ·
T tokens of a completion.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..activity import Phase, phase
from ..model.decoder import Decoder
from ..text.prompt_format import conversation
from ..text.tokenizer import Tokenizer
from ..types import Completion, Group, LimbeckError, Problem, generator
from .decode_batch import DecodeBatch, FinishedSequence
from .device_batch import DeviceBatch, room
from .device_speculative import DeviceSpeculation
from .sampling import SamplingParams
from .speculative import Speculation

PROMPT_STEP = 256  # tokens: the longest prompt of a device batch is a multiple of it


class Engine:
    """Samples completions from a decoder, at most `rows` sequences at once.

    With `speculate`, the model's multi-token prediction (MTP) module drafts every second token: the
    completions are the same, in fewer steps if many drafts are accepted. `drafted` and `accepted` count
    drafted and accepted tokens. `reserve` returns the bytes of a device's memory that are free now and that
    others will take, which the engine's pool of keys and values leaves them if one group has room beside.

    Raises:
        LimbeckError: `speculate` is set, and the model has no MTP module.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, rows: int = 256, speculate: bool = False):
        if speculate and not model.ahead:
            raise LimbeckError(
                "speculate: the model has no module that looks ahead (num_nextn_predict_layers is 0)"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.speculate = speculate
        self.drafted = 0
        self.accepted = 0
        self.reserve: Callable[[], int] = lambda: 0
        self._device_batch: DeviceBatch | None = None

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were accepted, which means that the model itself sampled the same
        token."""
        return self.accepted / max(1, self.drafted)

    def take_usage(self) -> dict[str, float]:
        """Return the metrics of the rollouts since the last call, and reset them: `accepted_drafts`, the
        share of drafted tokens that were accepted. Without `speculate` there are none."""
        metrics = {"accepted_drafts": self.acceptance} if self.speculate else {}
        self.drafted = 0
        self.accepted = 0
        return metrics

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Copy the weights `tensors`, by parameter name, into the model. A tensor that shares memory with the
        model's own is skipped."""
        for name, parameter in self.model.state_dict().items():
            if parameter.data_ptr() != tensors[name].data_ptr():
                parameter.copy_(tensors[name])

    def generate(
        self, prompts: Sequence[str], sampling: SamplingParams | None = None, seed: object = 0
    ) -> list[Completion]:
        """Return one completion of every prompt, a question as a user would ask it. `sampling` is by default
        `SamplingParams()`.

        A completion depends on its prompt and on `seed`, not on the other prompts. Raises LimbeckError if a
        prompt is too long, as `rollout` does.
        """
        problems = [Problem(prompt, prompt) for prompt in prompts]
        groups = self.rollout(problems, 1, sampling or SamplingParams(), seed)
        return [group.completions[0] for group in groups]

    def with_tokenizer(self, tokenizer: Tokenizer) -> Engine:
        """Return an engine with the same model and another tokenizer, by which prompts are rendered."""
        return Engine(self.model, tokenizer, self.rows)

    def rollout(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        seed: object,
        progress: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """Return a group of `group_size` completions for every problem, in the order of the problems.

        `progress(1)` is called for each finished completion. Raises LimbeckError if a prompt's length plus
        `sampling.max_new_tokens` exceeds the model's maximal number of positions.
        """
        prompts = [self._prompt(problem, sampling) for problem in problems]
        return self.sample(problems, prompts, group_size, sampling, seed, progress)

    @torch.no_grad()
    def sample(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[np.ndarray],
        group_size: int,
        sampling: SamplingParams,
        seed: object,
        progress: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """Return a group of `group_size` completions for every problem, as `rollout` does, from prompts that
        are rendered already: their token ids, each [N]."""
        waiting = deque(range(len(problems)))
        rows = len(problems) * group_size
        most = max(group_size, min(self.rows, rows))
        batch = self._new_batch(sampling, most, max(map(len, prompts), default=0), group_size)
        completions: list[list[Completion | None]] = [[None] * group_size for _ in problems]
        with phase("sampling", "problems", len(problems)) as groups, phase("", "rows", rows) as sampled:
            while waiting or batch.busy:
                admitted = self._next_problems(waiting, batch, prompts, group_size)
                if admitted:
                    uniforms = [_uniforms(problems[i], group_size, sampling, seed) for i in admitted]
                    batch.admit([(i, prompts[i]) for i in admitted], np.concatenate(uniforms), group_size)
                for sequence in _step(batch, sampled):
                    group = completions[sequence.problem]
                    group[sequence.sample] = self._completion(sequence, batch.stop_token_ids)
                    if None not in group:
                        groups.advance()
                    if progress:
                        progress(1)
        self.drafted += batch.drafted
        self.accepted += batch.accepted
        return [
            Group(problem, prompt, tuple(group))
            for problem, prompt, group in zip(problems, prompts, completions, strict=True)
        ]

    @torch.no_grad()
    def stream(self, prompt: np.ndarray, sampling: SamplingParams, seed: object) -> Iterator[int]:
        """Yield the token ids of one completion of `prompt` [N] as they are sampled, without the end-of-turn
        token."""
        self._check_length("the question", prompt, sampling)
        batch = self._new_batch(sampling, 1, len(prompt))
        uniforms_1T = generator(seed, "stream").random((1, sampling.max_new_tokens))
        batch.admit([(0, prompt)], uniforms_1T, 1)
        sent = 0
        while batch.busy:
            finished = batch.step()
            tokens = finished[0].tokens if finished else batch.tokens_BT[0, : batch.sampled_B[0]]
            for token in tokens[sent:].tolist():
                if token not in batch.stop_token_ids:
                    yield token
            sent = len(tokens)

    def _new_batch(
        self, sampling: SamplingParams, rows: int, longest: int, group: int = 1
    ) -> DecodeBatch | DeviceBatch:
        """Return an empty batch; where the weights are not on the host, one of at most so many `rows`, in
        groups of `group`, with prompts of at most `longest` tokens, the last one if it will do: its steps are
        captured already."""
        if self.model.ops.on_host:
            kind = Speculation if self.speculate else DecodeBatch
            return kind(self.model, self.tokenizer.end_id, sampling)
        last = self._device_batch
        fits = last and last.sampling == sampling and last.capacity >= rows and last.longest >= longest
        if fits and not last.busy:  # an interrupted rollout leaves rows behind
            last.reset_counts()
            return last
        if last:
            self._device_batch = None  # its memory is free before the new one takes its own
            if last.sampling == sampling:
                rows = max(rows, last.capacity)
                longest = max(longest, last.longest)
            del last
        kind = DeviceSpeculation if self.speculate else DeviceBatch
        least = kind.needed(longest, group, sampling.max_new_tokens)
        longest = -(-longest // PROMPT_STEP) * PROMPT_STEP
        free = room(self.model, 0, kind.modules)
        blocks = max(room(self.model, self.reserve(), kind.modules), min(free, least))
        self._device_batch = kind(self.model, self.tokenizer.end_id, sampling, rows, longest, blocks)
        return self._device_batch

    def _next_problems(
        self,
        waiting: deque[int],
        batch: DecodeBatch | DeviceBatch,
        prompts: Sequence[np.ndarray],
        group_size: int,
    ) -> list[int]:
        """Remove from `waiting` and return the problem indices whose whole groups fit into the free rows. If
        the batch is empty, one problem is returned even if its group exceeds `rows`."""
        free = self.rows - batch.busy
        if batch.busy and free < min(group_size, self.rows):
            return []
        count = min(len(waiting), max(1, free // group_size))
        if isinstance(batch, DeviceBatch) and count:
            lengths = [len(prompts[i]) for i in islice(waiting, count)]
            count = batch.fits(lengths, group_size)
            if not count and not batch.busy:
                raise batch.refused(lengths[0], group_size)
        return [waiting.popleft() for _ in range(count)]

    def _completion(self, sequence: FinishedSequence, stop_token_ids: set[int]) -> Completion:
        return Completion(
            sequence.tokens,
            sequence.logprobs,
            self.tokenizer.decode(sequence.tokens),
            int(sequence.tokens[-1]) in stop_token_ids,
            sequence.sample,
            sequence.kept_ids,
            sequence.routes,
        )

    def _prompt(self, problem: Problem, sampling: SamplingParams) -> np.ndarray:
        """Return the token ids [N] of a problem's prompt. Raises LimbeckError if it is too long."""
        prompt = self.tokenizer.prompt(conversation(problem.prompt, problem.system))
        if sampling.response_prefix:
            prompt = np.concatenate([prompt, np.array(sampling.response_prefix, np.int64)])
        self._check_system_prompt(problem, sampling)
        self._check_length(f"problem {problem.id}", prompt, sampling)
        return prompt

    def _check_system_prompt(self, problem: Problem, sampling: SamplingParams) -> None:
        """Raise LimbeckError if the system prompt alone, plus `sampling.max_new_tokens`, exceeds the model's
        maximal number of positions."""
        positions = self.model.config.max_positions
        if len(problem.system) + sampling.max_new_tokens <= positions:
            return  # a token has at least one character
        tokens = len(self.tokenizer.encode(problem.system))
        if tokens + sampling.max_new_tokens > positions:
            raise LimbeckError(
                f"problems.{problem.id.partition('/')[0]}.system: {tokens} tokens and "
                f"max_new_tokens={sampling.max_new_tokens} exceed the model's {positions} positions; "
                "shorten the system prompt"
            )

    def _check_length(self, name: str, prompt: np.ndarray, sampling: SamplingParams) -> None:
        """Raise LimbeckError if the length of `prompt` [N] plus `sampling.max_new_tokens` exceeds the model's
        maximal number of positions. `name` stands for the prompt in the message."""
        positions = self.model.config.max_positions
        if len(prompt) + sampling.max_new_tokens > positions:
            raise LimbeckError(
                f"{name}: {len(prompt)} prompt tokens and max_new_tokens={sampling.max_new_tokens} "
                f"exceed the model's {positions} positions; lower max_new_tokens or ask less"
            )


def _step(batch: DecodeBatch | DeviceBatch, sampled: Phase) -> list[FinishedSequence]:
    """Make one decode step, and count its tokens and its finished rows in `sampled`."""
    before = batch.sampled_tokens
    finished = batch.step()
    sampled.add_tokens(batch.sampled_tokens - before)
    if finished:
        sampled.advance(len(finished))
    return finished


def _uniforms(problem: Problem, group_size: int, sampling: SamplingParams, seed: object) -> np.ndarray:
    """Return the random numbers in [0, 1) for a problem's completions [B, T]: one row per completion, one
    number per token."""
    uniforms = []
    for sample in range(group_size):
        uniforms.append(generator(seed, problem.id, sample).random(sampling.max_new_tokens))
    return np.stack(uniforms)
