"""The decode batch of a server: sequences join and leave it at any step, each with its own sampling
parameters and length limit. A row is one sequence in the batch.

Dimensions: N positions · B rows · C hidden · T tokens of a completion · V vocabulary · K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.kv_cache import KVCache
from ..model.prefill_cache import SequenceKV
from ..text.tokenizer import Tokenizer
from ..types import generator
from .decode_batch import HEADROOM, DecodeBatch, FinishedSequence
from .request import Answer, Request, Top
from .sampling import Draw, SamplingParams, draw
from .thought_budget import ThoughtBudget


class SequenceState:
    """The state of one row of the batch: sequence number `sample` of the request of `output`, with its random
    numbers and the tokens that will be put in place of the next sampled ones (`forced`)."""

    def __init__(self, output: Answer, sample: int, tokenizer: Tokenizer):
        request = output.request
        self.request = request
        self.output = output
        self.sequence = output.choices[sample]
        self.random = generator(request.seed, "stream", sample)
        self.forced: list[int] = []
        self.thought: ThoughtBudget | None = None
        if request.thought_budget is not None:
            self.thought = ThoughtBudget(tokenizer, request.thought_budget, request.opened)
            self.check_thought()

    @property
    def aborted(self) -> bool:
        """True if the client has ended this sequence or cancelled its whole request, so that no more tokens
        are needed."""
        return self.output.cancelled or self.sequence.enough

    @property
    def checks_next(self) -> bool:
        """True if the thought has to be checked at the next token, before one more is sampled."""
        at = self.thought.check_at if self.thought is not None else None
        return at is not None and at <= len(self.sequence.tokens) + 1

    def check_thought(self) -> None:
        """If the thought (the reasoning before the answer) exceeds its budget, schedule the tokens of the
        closing marker as the next tokens of this row."""
        if self.thought is not None:
            self.forced += self.thought.forced(self.sequence.tokens)


class ServingBatch(DecodeBatch):
    """A batch of at most `max_rows` rows, whose KV caches together hold at most `max_tokens` tokens.

    `on_leave(state, row)` is called for each row that leaves, while its KV is still in the cache.
    `on_sampled()` is called in each step after all rows have a new token and before the forward pass that
    yields the next tokens.
    """

    records_routes = False

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...],
        max_rows: int,
        max_tokens: int,
    ):
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        sampling = SamplingParams(max_new_tokens=HEADROOM, stop_ids=stop_token_ids)
        super().__init__(model, tokenizer.end_id, sampling)
        self.tokenizer = tokenizer
        self.owners: list[SequenceState] = []
        self.limit_B = np.zeros(0, dtype=np.int64)  # maximal number of tokens of each completion
        self.ignore_eos_B = np.zeros(0, dtype=bool)
        self._groups: list[tuple[SamplingParams, Tensor]] | None = None
        self.on_leave: Callable[[SequenceState, int], None] = lambda state, row: None
        self.on_sampled: Callable[[], None] = lambda: None

    def _new_cache(self) -> KVCache:
        weight = self.model.embed.weight
        return KVCache(
            self.model.config,
            weight.dtype,
            weight.device,
            self.decoding is not None,
            HEADROOM,
            self.max_rows,
            self.max_tokens,
        )

    def add(self, past: SequenceKV, hidden_C: Tensor, output: Answer) -> None:
        """Add the rows of a request whose prompt has been prefilled. `past` is the prompt's KV, `hidden_C`
        the hidden state of its last token."""
        request = output.request
        count = request.copies
        states = [SequenceState(output, sample, self.tokenizer) for sample in range(count)]
        width = self.uniforms_BT.shape[1]
        uniforms = [state.random.random((1, width)) for state in states]
        self.uniforms_BT = np.concatenate([self.uniforms_BT, *uniforms])
        self._append_rows(count)
        self.penalties.append([request.prompt] * count, _penalties_of(request))
        self.limit_B = np.append(self.limit_B, [request.max_new_tokens] * count)
        self.ignore_eos_B = np.append(self.ignore_eos_B, [request.ignore_eos] * count)
        self.owners += states
        self.hidden_BC = torch.cat([self.hidden_BC, hidden_C.expand(count, -1)])
        self.cache.fork(past, [count])
        self._groups = None

    def step(self) -> list[FinishedSequence]:
        """Sample one token per row and append it to the row's output. The list returned is always empty:
        finished sequences are marked in their outputs."""
        if int(self.sampled_B.max()) == self.uniforms_BT.shape[1]:
            self._widen()
        return super().step()

    def remove_aborted(self) -> None:
        """Remove the rows whose client has ended them, with "stop" as the finish reason."""
        aborted_B = np.array([state.aborted for state in self.owners], dtype=bool)
        for row in aborted_B.nonzero()[0].tolist():
            self.owners[row].sequence.finish = "stop"
        self._remove(aborted_B)

    def _widen(self) -> None:
        """Double the number of tokens per row that the arrays hold, and draw the random numbers for them."""
        more = self.uniforms_BT.shape[1]
        self.tokens_BT = np.pad(self.tokens_BT, ((0, 0), (0, more)))
        self.logprobs_BT = np.pad(self.logprobs_BT, ((0, 0), (0, more)))
        uniforms_BT = np.stack([state.random.random(more) for state in self.owners])
        self.uniforms_BT = np.concatenate([self.uniforms_BT, uniforms_BT], 1)

    def _draw(self, logits_BV: Tensor, rows: np.ndarray, place_B: np.ndarray, previous_B: np.ndarray) -> Draw:
        """Draw a token for each of `rows` from its logits. Rows with the same sampling parameters are drawn
        together; a row with forced tokens gets the first of them instead. `place_B` is the token's index in
        its completion, `previous_B` the token before it."""
        uniform_B = torch.from_numpy(self.uniforms_BT[rows, place_B])
        previous_B = torch.from_numpy(previous_B)
        penalised_BV = self.penalties.apply(logits_BV, rows)
        tokens_B = torch.empty(len(rows), dtype=torch.long)
        logprobs_B = logits_BV.new_empty(len(rows))
        for sampling, group in self._sampling_groups():
            if len(group) == len(rows):
                drawn = draw(penalised_BV, uniform_B, previous_B, sampling)
            else:
                drawn = draw(penalised_BV[group], uniform_B[group], previous_B[group], sampling)
            tokens_B[group] = drawn.tokens_B
            logprobs_B[group] = drawn.logprobs_B
        for row, state in enumerate(self.owners):
            if state.forced:
                tokens_B[row] = state.forced.pop(0)
            if state.request.top is not None:
                _append_logprobs(state, logits_BV[row : row + 1], tokens_B[row : row + 1])
        return Draw(tokens_B, logprobs_B, None)

    def _sampling_groups(self) -> list[tuple[SamplingParams, Tensor]]:
        """Return each combination of sampling parameters in the batch but the penalties, with the indices of
        the rows that use it."""
        if self._groups is None:
            rows_of: dict[tuple[float, float, int, float], list[int]] = {}
            for row, state in enumerate(self.owners):
                request = state.request
                kind = (request.temperature, request.top_p, request.top_k, request.min_p)
                rows_of.setdefault(kind, []).append(row)
            self._groups = []
            for (temperature, top_p, top_k, min_p), rows in rows_of.items():
                sampling = SamplingParams(temperature, top_p, top_k=top_k, min_p=min_p)
                self._groups.append((sampling, torch.tensor(rows)))
        return self._groups

    def _remove_finished(self) -> list[FinishedSequence]:
        """Append the new tokens to the outputs and remove the rows that ended with a stop token or at their
        length limit. The list returned is always empty."""
        last_B = self.tokens_BT[np.arange(self.busy), self.sampled_B - 1]
        for state, token in zip(self.owners, last_B.tolist(), strict=True):
            state.sequence.tokens.append(token)
            state.check_thought()
        stopped_B = self.is_stop_V[last_B] & ~self.ignore_eos_B
        ended_B = stopped_B | (self.sampled_B >= self.limit_B)
        for row in ended_B.nonzero()[0].tolist():
            self.owners[row].sequence.finish = "stop" if stopped_B[row] else "length"
        self._remove(ended_B)
        self.on_sampled()
        return []

    def _remove(self, leaving_B: np.ndarray) -> None:
        if not leaving_B.any():
            return
        for row in leaving_B.nonzero()[0].tolist():
            self.on_leave(self.owners[row], row)
        self._select_rows(fill_gaps(leaving_B))

    def _select_rows(self, rows: np.ndarray) -> None:
        super()._select_rows(rows)
        self.limit_B = self.limit_B[rows]
        self.ignore_eos_B = self.ignore_eos_B[rows]
        self._groups = None


def _penalties_of(request: Request) -> SamplingParams:
    """Return the sampling parameters of a request with its penalties alone."""
    return SamplingParams(
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
    )


def top_logprobs(logits_NV: Tensor, tokens_N: Tensor, count: int) -> tuple[list[float], list[Top]]:
    """Return the log-probabilities at temperature 1 of `tokens_N`, one per position, and for each position
    the `count` most likely tokens as pairs (id, log-probability)."""
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    values_NK, ids_NK = logprobs_NV.topk(min(count, logprobs_NV.shape[1]))
    token_logprobs_N = logprobs_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
    tops: list[Top] = []
    for ids, values in zip(ids_NK.tolist(), values_NK.tolist(), strict=True):
        tops.append(tuple(zip(ids, values, strict=True)))
    return token_logprobs_N.tolist(), tops


def _append_logprobs(state: SequenceState, logits_1V: Tensor, token_1: Tensor) -> None:
    """Append to a sequence's output the log-probability of its new token, and the most likely tokens at that
    position. `logits_1V` are the logits [1, V] from which the token `token_1` [1] was sampled."""
    (logprob,), (top,) = top_logprobs(logits_1V, token_1, state.request.top)
    state.sequence.logprobs.append(logprob)
    state.sequence.tops.append(top)


def fill_gaps(leaving_B: np.ndarray) -> np.ndarray:
    """Return the rows to keep, in their new order: rows from the end are moved into the places of leaving
    rows, and all others keep their place, so that little of the cache is copied. `leaving_B` is True for the
    rows to remove."""
    staying = len(leaving_B) - int(leaving_B.sum())
    rows = np.arange(staying)
    rows[leaving_B[:staying]] = staying + (~leaving_B[staying:]).nonzero()[0]
    return rows
