"""A decode batch: the KV cache, the sampled tokens, and the (problem, sample) of each row. Numbers a row are numpy's, whose
calls cost a fifth of torch's on arrays this small.

B rows · T tokens of a completion · C hidden · V vocabulary · L sparse layers · K experts chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.ffn import Routes
from ..model.kernels.decode_step import Decoding
from ..model.kv_cache import KVCache, Packed
from ..model.linear import product
from .sampling import Draw, SamplingParams, draw

AHEAD = 128  # tokens that a completion's cache has room for when it begins: growing copies it
COMPACT = 0.75  # drop finished rows when fewer than this share is alive: copying costs, so do idle rows


@dataclass(frozen=True)
class Row:
    """A finished row: what was sampled, at which log-probabilities, from what top-p left, through which experts."""

    tokens: np.ndarray
    logprobs: np.ndarray
    kept: tuple[np.ndarray, ...] | None
    routes: np.ndarray | None


class DecodeBatch:
    """One token a row and step; `hidden_BC` is the state that the next token is sampled from."""

    drafted = accepted = 0
    held_back = 0  # tokens of a prompt that are left to the first step
    compiled = True  # whether the kernels' step of decoding will do

    def __init__(self, model: Decoder, end: int, sampling: SamplingParams):
        weight = model.embed.weight
        self.model, self.sampling = model, sampling
        self.ends = {end, *sampling.stop_ids}
        self.ends_V = np.zeros(max(model.config.vocab_size, max(self.ends) + 1), dtype=bool)
        self.ends_V[list(self.ends)] = True
        self.decoding = Decoding(model) if self.compiled and Decoding.fits(model) else None
        budget = sampling.max_new_tokens
        self.cache = KVCache(
            model.config, weight.dtype, weight.device, self.decoding is not None, min(budget, AHEAD)
        )
        self.tokens_BT = np.zeros((0, budget), dtype=np.int64)
        self.logprobs_BT = np.zeros(
            (0, budget), dtype=np.float64 if weight.dtype == torch.float64 else np.float32
        )
        self.uniforms_BT = np.zeros((0, budget))
        self.age_B = np.zeros(0, dtype=np.int64)
        self.alive_B = np.zeros(0, dtype=bool)
        self.owners: list[tuple[int, int]] = []
        self.kept: list[list[np.ndarray]] = []
        self.hidden_BC = torch.zeros(0, model.config.hidden_size, dtype=weight.dtype)
        self.sparse = sum(model.config.sparse(layer) for layer in range(model.config.layers))
        if self.sparse:
            self.routes_BTLK = np.zeros(
                (0, budget + 1, self.sparse, model.config.experts.top_k), dtype=np.int16
            )
            self.begun: list[np.ndarray] = []

    @property
    def busy(self) -> int:
        return len(self.owners)

    def admit(self, prompts: list[tuple[int, np.ndarray]], uniforms: np.ndarray, copies: int) -> None:
        """Prefill prompts, shortest first so that attention pads little, and fork each into `copies` rows."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))
        rows = np.array([i * copies + c for i in order for c in range(copies)])
        self.tokens_BT, self.logprobs_BT = (_longer(x, len(rows)) for x in (self.tokens_BT, self.logprobs_BT))
        self.uniforms_BT = np.concatenate([self.uniforms_BT, uniforms[rows]])
        self.age_B, self.alive_B = (
            _longer(self.age_B, len(rows)),
            np.append(self.alive_B, np.ones(len(rows), dtype=bool)),
        )
        self.owners += [(prompts[i][0], c) for i in order for c in range(copies)]
        self.kept += [[] for _ in rows]
        if self.sparse:
            self.routes_BTLK = _longer(self.routes_BTLK, len(rows))
        self._prefill([prompts[i][1] for i in order], copies)

    def _prefill(self, prompts: list[np.ndarray], copies: int) -> None:
        lengths = [len(prompt) for prompt in prompts]
        prefill = Packed(lengths).keep()
        hidden_NC = self._run(torch.from_numpy(np.concatenate(prompts)), prefill)
        last_BC = hidden_NC[torch.tensor(lengths).cumsum(0) - 1].repeat_interleave(copies, 0)
        self.hidden_BC = torch.cat([self.hidden_BC, last_BC])
        self._begin(prefill, lengths, copies)

    def _begin(self, prefill: Packed, lengths: list[int], copies: int) -> None:
        self.cache.fork(prefill, [copies] * len(lengths))
        if self.sparse:
            met_NLK = torch.stack(prefill.routes.chosen[: self.sparse], 1).short().split(lengths)
            self.begun += [routes.numpy() for routes in met_NLK for _ in range(copies)]

    def _run(self, tokens_N: Tensor, context: Packed | KVCache) -> Tensor:
        context.routes = Routes() if self.sparse else None
        return self.model(tokens_N, context)

    def step(self) -> list[tuple[int, int, Row]]:
        """Sample one token a row, hand back the finished rows, and run the rest one token further."""
        self._say(self.hidden_BC, self.alive_B)
        finished = self._finish()
        if self.alive_B.any():
            self.cache.rest(~self.alive_B)
            self.cache.advance()
            rows, fed_B = np.arange(self.busy), self.age_B - 1
            tokens_B = torch.from_numpy(self.tokens_BT[rows, fed_B])
            self.hidden_BC = (
                self.decoding(tokens_B, self.cache) if self.decoding else self._run(tokens_B, self.cache)
            )
            if self.sparse:
                self.routes_BTLK[rows, fed_B] = torch.stack(self.cache.routes.chosen, 1).numpy()
        return finished

    def _say(self, hidden_BC: Tensor, speaking_B: np.ndarray) -> np.ndarray:
        """Sample the next token of the rows that speak; the others' is drawn and forgotten."""
        rows = np.arange(self.busy)
        age_B = np.minimum(self.age_B, self.tokens_BT.shape[1] - 1)
        logits_BV = product(hidden_BC, self.model.head.weight)
        chosen = self._draw(logits_BV, rows, age_B, self.tokens_BT[rows, np.maximum(age_B - 1, 0)])
        tokens_B, logprobs_B = chosen.tokens_B.numpy(), chosen.logprobs_B.numpy()
        self.tokens_BT[rows[speaking_B], age_B[speaking_B]] = tokens_B[speaking_B]
        self.logprobs_BT[rows[speaking_B], age_B[speaking_B]] = logprobs_B[speaking_B]
        if chosen.kept_BV is not None:
            for i in speaking_B.nonzero()[0]:
                self.kept[i].append(chosen.kept_BV[i].nonzero().flatten().numpy())
        self.age_B = self.age_B + speaking_B
        return tokens_B

    def _draw(self, logits_BV: Tensor, rows: np.ndarray, age_B: np.ndarray, previous_B: np.ndarray) -> Draw:
        return draw(
            logits_BV,
            torch.from_numpy(self.uniforms_BT[rows, age_B]),
            torch.from_numpy(previous_B),
            self.sampling,
        )

    def _finish(self) -> list[tuple[int, int, Row]]:
        """The rows that ended just now; when too few are left alive, the others go."""
        last_B = self.tokens_BT[np.arange(self.busy), np.maximum(self.age_B - 1, 0)]
        ended_B = (self.ends_V[last_B] | (self.age_B >= self.sampling.max_new_tokens)) & self.alive_B
        finished = [self._row(int(i)) for i in ended_B.nonzero()[0]]
        self.alive_B = self.alive_B & ~ended_B
        if self.alive_B.sum() < COMPACT * self.busy:
            self._keep(self.alive_B.nonzero()[0])
        return finished

    def _row(self, i: int) -> tuple[int, int, Row]:
        age = int(self.age_B[i])
        kept = tuple(self.kept[i]) if self.kept[i] else None
        routes = None
        if self.sparse:
            routes = np.concatenate([self.begun[i], self.routes_BTLK[i, : age - 1 + self.held_back]])
        tokens, logprobs = self.tokens_BT[i, :age].copy(), self.logprobs_BT[i, :age].astype(np.float32)
        return (*self.owners[i], Row(tokens, logprobs, kept, routes))

    def _keep(self, rows: np.ndarray) -> None:
        """Keep only these rows."""
        self.cache.keep(rows)
        self.tokens_BT, self.logprobs_BT = self.tokens_BT[rows], self.logprobs_BT[rows]
        self.uniforms_BT, self.age_B = self.uniforms_BT[rows], self.age_B[rows]
        self.alive_B, self.hidden_BC = self.alive_B[rows], self.hidden_BC[torch.from_numpy(rows)]
        self.owners = [self.owners[i] for i in rows.tolist()]
        self.kept = [self.kept[i] for i in rows.tolist()]
        if self.sparse:
            self.routes_BTLK = self.routes_BTLK[rows]
            self.begun = [self.begun[i] for i in rows.tolist()]


def _longer(x: np.ndarray, rows: int) -> np.ndarray:
    """With so many rows of zeros behind."""
    return np.concatenate([x, np.zeros((rows, *x.shape[1:]), dtype=x.dtype)])
