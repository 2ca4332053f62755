"""The decode batch of serving: sequences join and leave at any step, each with its own sampling parameters and length limit.

B rows · C hidden · T tokens of a completion · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.kv_cache import KVCache
from ..model.prefill_cache import SequenceKV
from ..text.tokenizer import CLOSE, OPEN, Tokenizer, overlap
from ..types import generator
from .decode_batch import AHEAD, DecodeBatch, Row, _longer
from .request import Answer, Top
from .sampling import Draw, SamplingParams, draw

PATIENCE = 8  # tokens that a thought may go on for, to end where it can


class SequenceState:
    """One row: whose answer it is, where its randomness comes from, and what it must say whatever the model would."""

    def __init__(self, answer: Answer, sample: int):
        request = answer.request
        self.answer, self.choice = answer, answer.choices[sample]
        self.random = generator(request.seed, "stream", sample)
        self.forced: list[int] = []
        self.inside = request.opened
        self.look: int | None = None  # after how many tokens somebody looks how far the thought is
        if request.thought_budget is not None:
            self.look = self.over = request.thought_budget if request.opened else 1

    def watch(self, tokenizer: Tokenizer) -> None:
        """Close a thought that is still open after its budget: the marker is said next, token by token. A character
        or a marker that is half said may be finished first."""
        said = self.choice.tokens
        while self.look is not None and len(said) >= self.look:
            text = tokenizer.decode(said)
            if self.inside and CLOSE not in text:
                if (text.endswith("\ufffd") or overlap(text, CLOSE)) and len(said) < self.over + PATIENCE:
                    self.look += 1
                else:
                    self.look, self.forced = None, tokenizer.encode(CLOSE)
            elif self.inside:
                self.look = None
            elif text.lstrip().startswith(OPEN):
                self.inside, self.look = True, len(said) + self.answer.request.thought_budget
                self.over = self.look
            else:  # it may still begin to think
                self.look = self.look + 1 if OPEN.startswith(text.lstrip()) else None


class ServingBatch(DecodeBatch):
    """At most `rows` rows, whose caches together hold at most `tokens` tokens."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, ends: tuple[int, ...], rows: int, tokens: int):
        super().__init__(model, tokenizer.end_id, SamplingParams(max_new_tokens=AHEAD, stop_ids=ends))
        weight = model.embed.weight
        self.cache = KVCache(
            model.config, weight.dtype, weight.device, self.decoding is not None, AHEAD, rows, tokens
        )
        self.sparse = 0  # which experts were met is for learning
        self.tokenizer, self.owners = tokenizer, []
        self.limit_B, self.endless_B = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
        self._alike: list[tuple[SamplingParams, Tensor]] | None = None
        self.told: Callable[[SequenceState, int], None] = lambda sequence_state, row: (
            None
        )  # of rows that leave, while they still lie there
        self.said: Callable[[], None] = lambda: (
            None
        )  # each step, before the state is computed that the next tokens come from

    def board(self, past: SequenceKV, hidden_C: Tensor, answer: Answer) -> None:
        """Let a prompt's rows in: `past` is what its tokens left, `hidden_C` the state after the last of them."""
        request, width = answer.request, self.uniforms_BT.shape[1]
        sequence_states = [SequenceState(answer, sample) for sample in range(request.copies)]
        for sequence_state in sequence_states:
            sequence_state.watch(self.tokenizer)
        self.tokens_BT, self.logprobs_BT = (
            _longer(x, len(sequence_states)) for x in (self.tokens_BT, self.logprobs_BT)
        )
        self.uniforms_BT = np.concatenate(
            [
                self.uniforms_BT,
                *(sequence_state.random.random((1, width)) for sequence_state in sequence_states),
            ]
        )
        self.age_B, self.alive_B = (
            _longer(self.age_B, len(sequence_states)),
            np.append(self.alive_B, np.ones(len(sequence_states), dtype=bool)),
        )
        self.limit_B = np.append(self.limit_B, [request.max_new_tokens] * len(sequence_states))
        self.endless_B = np.append(self.endless_B, [request.endless] * len(sequence_states))
        self.owners += sequence_states
        self.kept += [[] for _ in sequence_states]
        self.hidden_BC = torch.cat([self.hidden_BC, hidden_C.expand(len(sequence_states), -1)])
        self.cache.fork(past, [len(sequence_states)])
        self._alike = None

    def step(self) -> list[tuple[int, int, Row]]:
        """One token a row; answers are written where they belong, so nothing is handed back."""
        if int(self.age_B.max()) == self.uniforms_BT.shape[1]:
            self._widen()
        return super().step()

    def drop(self) -> None:
        """Rows of which nobody wants more leave."""
        unwanted_B = np.array(
            [
                sequence_state.answer.cancelled or sequence_state.choice.enough
                for sequence_state in self.owners
            ],
            dtype=bool,
        )
        for i in unwanted_B.nonzero()[0].tolist():
            self.owners[i].choice.finish = "stop"
        self._leave(unwanted_B)

    def _widen(self) -> None:
        more = self.uniforms_BT.shape[1]
        self.tokens_BT, self.logprobs_BT = (
            np.pad(x, ((0, 0), (0, more))) for x in (self.tokens_BT, self.logprobs_BT)
        )
        self.uniforms_BT = np.concatenate(
            [
                self.uniforms_BT,
                np.stack([sequence_state.random.random(more) for sequence_state in self.owners]),
            ],
            1,
        )

    def _draw(self, logits_BV: Tensor, rows: np.ndarray, age_B: np.ndarray, previous_B: np.ndarray) -> Draw:
        """Rows that sample alike are drawn together, just as a rollout would."""
        uniform_B, previous_B = torch.from_numpy(self.uniforms_BT[rows, age_B]), torch.from_numpy(previous_B)
        tokens_B, logprobs_B = torch.empty(len(rows), dtype=torch.long), logits_BV.new_empty(len(rows))
        for sampling, some in self._groups():
            whole = len(some) == len(rows)
            given = (
                (logits_BV, uniform_B, previous_B)
                if whole
                else (logits_BV[some], uniform_B[some], previous_B[some])
            )
            tokens_B[some], logprobs_B[some], _ = draw(*given, sampling)
        for i, sequence_state in enumerate(self.owners):
            if sequence_state.forced:
                tokens_B[i] = sequence_state.forced.pop(0)
            if sequence_state.answer.request.top is not None:
                (logprob,), (top,) = likeliest(
                    logits_BV[i : i + 1], tokens_B[i : i + 1], sequence_state.answer.request.top
                )
                sequence_state.choice.logprobs.append(logprob)
                sequence_state.choice.tops.append(top)
        return Draw(tokens_B, logprobs_B, None)

    def _groups(self) -> list[tuple[SamplingParams, Tensor]]:
        if self._alike is None:
            kinds: dict[tuple[float, float], list[int]] = {}
            for i, sequence_state in enumerate(self.owners):
                kinds.setdefault(
                    (sequence_state.answer.request.temperature, sequence_state.answer.request.top_p), []
                ).append(i)
            self._alike = [(SamplingParams(*kind), torch.tensor(some)) for kind, some in kinds.items()]
        return self._alike

    def _finish(self) -> list[tuple[int, int, Row]]:
        """Hand the new tokens over; rows that ended leave at once."""
        last_B = self.tokens_BT[np.arange(self.busy), self.age_B - 1]
        for sequence_state, token in zip(self.owners, last_B.tolist(), strict=True):
            sequence_state.choice.tokens.append(token)
            sequence_state.watch(self.tokenizer)
        ended_B = self.ends_V[last_B] & ~self.endless_B
        over_B = ended_B | (self.age_B >= self.limit_B)
        for i in over_B.nonzero()[0].tolist():
            self.owners[i].choice.finish = "stop" if ended_B[i] else "length"
        self._leave(over_B)
        self.said()
        return []

    def _leave(self, leaving_B: np.ndarray) -> None:
        if leaving_B.any():
            for i in leaving_B.nonzero()[0].tolist():
                self.told(self.owners[i], i)
            self._keep(_closed_up(leaving_B))

    def _keep(self, rows: np.ndarray) -> None:
        super()._keep(rows)
        self.limit_B, self.endless_B, self._alike = self.limit_B[rows], self.endless_B[rows], None


def likeliest(logits_NV: Tensor, tokens_N: Tensor, count: int) -> tuple[list[float], list[Top]]:
    """Log-probabilities at temperature 1 of these tokens, and of the `count` likeliest in each place."""
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    values_NK, ids_NK = logprobs_NV.topk(min(count, logprobs_NV.shape[1]))
    said = logprobs_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
    return said.tolist(), [
        tuple(zip(*pair, strict=True)) for pair in zip(ids_NK.tolist(), values_NK.tolist(), strict=True)
    ]


def _closed_up(leaving_B: np.ndarray) -> np.ndarray:
    """Who sits in each place when the last ones have moved into the places that fell free."""
    staying = len(leaving_B) - int(leaving_B.sum())
    rows = np.arange(staying)
    rows[leaving_B[:staying]] = staying + (~leaving_B[staying:]).nonzero()[0]
    return rows
