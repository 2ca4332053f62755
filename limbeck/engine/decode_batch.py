"""A decode batch: the KV cache, the sampled tokens, and the (problem, sample) of each row. A row is one
sequence that is being sampled. The state of the rows is held in numpy arrays, whose calls cost a fifth of
torch's on arrays this small.

Dimensions: N packed tokens · B rows · T tokens of a completion · C hidden · V vocabulary · L sparse
(mixture-of-experts) layers · K experts chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.ffn import RouterTrace
from ..model.kernels.decode_step import DecodeStep
from ..model.kv_cache import KVCache, Packed
from .penalties import Penalties
from .sampling import Draw, SamplingParams, draw

HEADROOM = 128  # tokens per row that a new cache has room for; growing it later copies the whole cache
# Finished rows are dropped once less than this share of all rows is unfinished: dropping copies the cache,
# and rows that stay cost computation.
MIN_ALIVE_SHARE = 0.75


@dataclass(frozen=True)
class FinishedSequence:
    """A finished completion: number `sample` of the group of the problem with index `problem`.

    `tokens` [T] and `logprobs` [T] are as sampled. `kept_ids` has for each token the ids that sampling left
    (None unless `SamplingParams.keep_mask` is set). `routes` [prompt length + T - 1, L, K] has the
    experts chosen for each token but the last, which is never run (None in a dense model).
    """

    problem: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    kept_ids: tuple[np.ndarray, ...] | None
    routes: np.ndarray | None


class DecodeBatch:
    """A batch of sequences, of which each `step` samples one token per row. `hidden_BC` is the hidden state
    from which each row's next token is sampled."""

    drafted = 0
    accepted = 0
    sampled_tokens = 0  # tokens sampled so far, for the display of progress
    tokens_deferred = 0  # tokens at the end of a prompt that are run by the first step, not by the prefill
    compiled = True  # True if the compiled decode step may be used
    records_routes = True  # True if finished sequences have the experts chosen for their tokens

    def __init__(self, model: Decoder, end_id: int, sampling: SamplingParams):
        self.model = model
        self.sampling = sampling
        self.stop_token_ids = {end_id, *sampling.stop_ids}
        self.is_stop_V = np.zeros(max(model.config.vocab_size, max(self.stop_token_ids) + 1), dtype=bool)
        self.is_stop_V[list(self.stop_token_ids)] = True
        fits = self.compiled and DecodeStep.fits(model)
        self.decoding = DecodeStep(model) if fits else None
        self.cache = self._new_cache()
        self.owners: list[Any] = []  # for each row the pair (problem, sample)
        self._allocate()

    def _new_cache(self) -> KVCache:
        weight = self.model.embed.weight
        headroom = min(self.sampling.max_new_tokens, HEADROOM)
        return KVCache(self.model.config, weight.dtype, weight.device, self.decoding is not None, headroom)

    def _allocate(self) -> None:
        """Create the arrays that hold the state of the rows, with zero rows in them."""
        config = self.model.config
        dtype = self.model.embed.weight.dtype
        max_tokens = self.sampling.max_new_tokens
        self.tokens_BT = np.zeros((0, max_tokens), dtype=np.int64)
        precision = np.float64 if dtype == torch.float64 else np.float32
        self.logprobs_BT = np.zeros((0, max_tokens), dtype=precision)
        self.uniforms_BT = np.zeros((0, max_tokens))
        self.sampled_B = np.zeros(0, dtype=np.int64)  # tokens that each row has sampled so far
        self.alive_B = np.zeros(0, dtype=bool)
        self.kept_ids: list[list[np.ndarray]] = []
        self.penalties = Penalties(config.vocab_size)
        self.hidden_BC = torch.zeros(0, config.hidden_size, dtype=dtype)
        sparse_layers = sum(config.sparse(layer) for layer in range(config.layers))
        self.sparse_layers = sparse_layers if self.records_routes else 0
        if self.sparse_layers:
            shape = (0, max_tokens + 1, self.sparse_layers, config.experts.top_k)
            self.routes_BTLK = np.zeros(shape, dtype=np.int16)
            self.prompt_routes: list[np.ndarray] = []

    @property
    def busy(self) -> int:
        """The number of rows in the batch, including finished rows that have not been dropped yet."""
        return len(self.owners)

    def admit(self, prompts: list[tuple[int, np.ndarray]], uniforms_BT: np.ndarray, n: int) -> None:
        """Prefill prompts and fork each into `n` rows. `prompts` has a pair (problem index, token ids) for
        each; the shortest are put first, so that attention pads little.

        `uniforms_BT` has one random number in [0, 1) for each token of each new row: the `n` rows of the
        first prompt come first, then those of the second, in the order of `prompts`.
        """
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))
        new_rows = np.array([i * n + sample for i in by_length for sample in range(n)])
        self.uniforms_BT = np.concatenate([self.uniforms_BT, uniforms_BT[new_rows]])
        self._append_rows(len(new_rows))
        self.owners += [(prompts[i][0], sample) for i in by_length for sample in range(n)]
        if self.sparse_layers:
            self.routes_BTLK = append_zeros(self.routes_BTLK, len(new_rows))
        sorted_prompts = [prompts[i][1] for i in by_length]
        self.penalties.append([prompt for prompt in sorted_prompts for _ in range(n)], self.sampling)
        self._prefill(sorted_prompts, n)

    def _append_rows(self, count: int) -> None:
        """Append `count` empty rows to the arrays that both this class and its subclasses use."""
        self.tokens_BT = append_zeros(self.tokens_BT, count)
        self.logprobs_BT = append_zeros(self.logprobs_BT, count)
        self.sampled_B = append_zeros(self.sampled_B, count)
        self.alive_B = np.append(self.alive_B, np.ones(count, dtype=bool))
        self.kept_ids += [[] for _ in range(count)]

    def _prefill(self, prompts: list[np.ndarray], n: int) -> None:
        lengths = [len(prompt) for prompt in prompts]
        prefill = Packed(lengths).keep()
        hidden_NC = self._forward(torch.from_numpy(np.concatenate(prompts)), prefill)
        last_tokens = torch.tensor(lengths).cumsum(0) - 1
        last_BC = hidden_NC[last_tokens].repeat_interleave(n, 0)
        self.hidden_BC = torch.cat([self.hidden_BC, last_BC])
        self._fork(prefill, lengths, n)

    def _fork(self, prefill: Packed, lengths: list[int], n: int) -> None:
        """Copy the KV of each prefilled prompt, and the experts chosen for its tokens, into `n` rows.
        `lengths` has the number of tokens of each prompt."""
        self.cache.fork(prefill, [n] * len(lengths))
        if not self.sparse_layers:
            return
        chosen_NLK = torch.stack(prefill.routes.chosen[: self.sparse_layers], 1).short()
        for routes in chosen_NLK.split(lengths):
            self.prompt_routes += [routes.numpy()] * n

    def _forward(self, tokens_N: Tensor, context: Packed | KVCache) -> Tensor:
        """Run tokens through the model and return their hidden states [N, C]. In a sparse model
        `context.routes` then has the experts that were chosen for each token."""
        context.routes = RouterTrace() if self.sparse_layers else None
        return self.model(tokens_N, context)

    def step(self) -> list[FinishedSequence]:
        """Sample one token per row, remove and return the rows that are finished, and run the new tokens of
        the other rows through the model."""
        self._sample(self.hidden_BC, self.alive_B)
        finished = self._remove_finished()
        if self.alive_B.any():
            self._advance()
        return finished

    def _advance(self) -> None:
        """Run each row's newest token through the model, which gives the hidden states for the next step."""
        self.cache.reset_idle(~self.alive_B)
        self.cache.advance()
        rows = np.arange(self.busy)
        newest_B = self.sampled_B - 1
        tokens_B = torch.from_numpy(self.tokens_BT[rows, newest_B])
        if self.decoding:
            self.hidden_BC = self.decoding(tokens_B, self.cache)
        else:
            self.hidden_BC = self._forward(tokens_B, self.cache)
        if self.sparse_layers:
            self.routes_BTLK[rows, newest_B] = torch.stack(self.cache.routes.chosen, 1).numpy()

    def _sample(self, hidden_BC: Tensor, active_B: np.ndarray) -> np.ndarray:
        """Sample a token for every row and return all of them [B]. The token is appended to the row where
        `active_B` is true, and discarded elsewhere."""
        rows = np.arange(self.busy)
        place_B = np.minimum(self.sampled_B, self.tokens_BT.shape[1] - 1)
        previous_B = self.tokens_BT[rows, np.maximum(place_B - 1, 0)]
        logits_BV = self.model.ops.logits(hidden_BC, self.model.head.weight)
        drawn = self._draw(logits_BV, rows, place_B, previous_B)
        tokens_B = drawn.tokens_B.numpy()
        active_rows = rows[active_B]
        active_places = place_B[active_B]
        self.tokens_BT[active_rows, active_places] = tokens_B[active_B]
        self.logprobs_BT[active_rows, active_places] = drawn.logprobs_B.numpy()[active_B]
        if drawn.kept_BV is not None:
            for row in active_rows:
                self.kept_ids[row].append(drawn.kept_BV[row].nonzero().flatten().numpy())
        self.sampled_B = self.sampled_B + active_B
        self.penalties.count(active_rows, tokens_B[active_B])
        self.sampled_tokens += len(active_rows)
        return tokens_B

    def _draw(self, logits_BV: Tensor, rows: np.ndarray, place_B: np.ndarray, previous_B: np.ndarray) -> Draw:
        """Draw a token for each of `rows` from its logits. `place_B` is the token's index in its completion,
        which selects the random number; `previous_B` is the token before it."""
        uniform_B = torch.from_numpy(self.uniforms_BT[rows, place_B])
        logits_BV = self.penalties.apply(logits_BV, rows)
        return draw(logits_BV, uniform_B, torch.from_numpy(previous_B), self.sampling)

    def _remove_finished(self) -> list[FinishedSequence]:
        """Mark the rows whose completion ended in this step as finished and return their sequences. Finished
        rows are dropped from the arrays once the share of unfinished ones is below `MIN_ALIVE_SHARE`."""
        last_B = self.tokens_BT[np.arange(self.busy), np.maximum(self.sampled_B - 1, 0)]
        ended_B = self.is_stop_V[last_B] | (self.sampled_B >= self.sampling.max_new_tokens)
        ended_B &= self.alive_B
        finished = [self._finished_sequence(row) for row in ended_B.nonzero()[0].tolist()]
        self.alive_B = self.alive_B & ~ended_B
        if self.alive_B.sum() < MIN_ALIVE_SHARE * self.busy:
            self._select_rows(self.alive_B.nonzero()[0])
        return finished

    def _finished_sequence(self, row: int) -> FinishedSequence:
        problem, sample = self.owners[row]
        length = int(self.sampled_B[row])
        tokens = self.tokens_BT[row, :length].copy()
        logprobs = self.logprobs_BT[row, :length].astype(np.float32)
        kept_ids = tuple(self.kept_ids[row]) if self.kept_ids[row] else None
        routes = None
        if self.sparse_layers:
            completion_routes = self.routes_BTLK[row, : length - 1 + self.tokens_deferred]
            routes = np.concatenate([self.prompt_routes[row], completion_routes])
        return FinishedSequence(problem, sample, tokens, logprobs, kept_ids, routes)

    def _select_rows(self, rows: np.ndarray) -> None:
        """Keep only the rows with the indices `rows`, in that order, and drop all others."""
        self.cache.select_rows(rows)
        self.penalties.select_rows(rows)
        self.tokens_BT = self.tokens_BT[rows]
        self.logprobs_BT = self.logprobs_BT[rows]
        self.uniforms_BT = self.uniforms_BT[rows]
        self.sampled_B = self.sampled_B[rows]
        self.alive_B = self.alive_B[rows]
        self.hidden_BC = self.hidden_BC[torch.from_numpy(rows)]
        row_list = rows.tolist()
        self.owners = [self.owners[row] for row in row_list]
        self.kept_ids = [self.kept_ids[row] for row in row_list]
        if self.sparse_layers:
            self.routes_BTLK = self.routes_BTLK[rows]
            self.prompt_routes = [self.prompt_routes[row] for row in row_list]


def append_zeros(x: np.ndarray, rows: int) -> np.ndarray:
    """Return `x` [B, ...] with `rows` rows of zeros appended along its first dimension."""
    return np.concatenate([x, np.zeros((rows, *x.shape[1:]), dtype=x.dtype)])
