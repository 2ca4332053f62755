"""Speculative decoding with the model's own module that looks ahead (DeepSeek-V3, arXiv 2412.19437, section 5.4.3).

Each step runs a row's newest token and a draft of the one after it. The draft is drawn with the very number
that the real token will be drawn with, so agreement is likely, and a draft is kept only where the model itself
draws the same token: the tokens are those of plain decoding, one by one, whatever the drafts were worth.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.decoder import Decoder
from ..model.kv_cache import Packed
from .decode_batch import DecodeBatch, Row
from .sampling import SamplingParams


class Speculation(DecodeBatch):
    """Up to two tokens a row and step. A prompt's last token is left to the first step, which drafts already."""

    held_back = 1
    compiled = False  # two tokens a row

    def __init__(self, model: Decoder, end: int, sampling: SamplingParams):
        super().__init__(model, end, sampling)
        self.newest_B = self.draft_B = np.zeros(0, dtype=np.int64)
        self.drafted = self.accepted = 0

    def _prefill(self, prompts: list[np.ndarray], copies: int) -> None:
        lengths = [len(prompt) - 1 for prompt in prompts]
        prefill = Packed(lengths).keep()
        hidden_NC = self._run(torch.from_numpy(np.concatenate([prompt[:-1] for prompt in prompts])), prefill)
        routes, prefill.routes = prefill.routes, None
        next_N = torch.from_numpy(np.concatenate([prompt[1:] for prompt in prompts]))
        ahead_NC = self.model.predict_next(hidden_NC, next_N, prefill)
        prefill.routes = routes
        last = torch.tensor(lengths).cumsum(0) - 1
        newest_B = np.repeat([int(prompt[-1]) for prompt in prompts], copies)
        fresh = np.arange(self.busy - len(newest_B), self.busy)
        draft_B = self._guess(ahead_NC[last].repeat_interleave(copies, 0), newest_B, fresh)
        self.newest_B, self.draft_B = np.append(self.newest_B, newest_B), np.append(self.draft_B, draft_B)
        self.hidden_BC = self.hidden_BC.new_zeros(self.busy, self.hidden_BC.shape[1])
        self._begin(prefill, lengths, copies)

    def step(self) -> list[tuple[int, int, Row]]:
        """Run newest token and draft, sample once or twice a row, draft again, hand back the finished rows."""
        rows, began_B = np.arange(self.busy), self.age_B
        self.cache.rest(~self.alive_B)
        self.cache.advance(2)
        hidden_BSC = self._run(
            torch.from_numpy(np.stack([self.newest_B, self.draft_B], 1).ravel()), self.cache
        ).view(self.busy, 2, -1)
        if self.sparse:
            met_BSLK = (
                torch.stack(self.cache.routes.chosen, 1)
                .view(self.busy, 2, *self.routes_BTLK.shape[2:])
                .numpy()
            )
            for i in range(2):
                self.routes_BTLK[rows, np.minimum(began_B + i, self.routes_BTLK.shape[1] - 1)] = met_BSLK[
                    :, i
                ]
        first_B = self._say(hidden_BSC[:, 0], self.alive_B)
        going_B = self.alive_B & ~self.ends_V[first_B] & (self.age_B < self.sampling.max_new_tokens)
        agreed_B = going_B & (first_B == self.draft_B)
        self.drafted, self.accepted = self.drafted + int(going_B.sum()), self.accepted + int(agreed_B.sum())
        second_B = self._say(hidden_BSC[:, 1], agreed_B)
        self.cache.routes = None
        next_N = torch.from_numpy(np.stack([first_B, second_B], 1).ravel())
        ahead_BSC = self.model.predict_next(hidden_BSC.flatten(0, 1), next_N, self.cache).view_as(hidden_BSC)
        self.cache.rollback(~agreed_B)
        self.newest_B = np.where(agreed_B, second_B, first_B)
        self.draft_B = self._guess(
            ahead_BSC[torch.from_numpy(rows), torch.from_numpy(agreed_B).long()], self.newest_B, rows
        )
        return self._finish()

    def _guess(self, ahead_BC: Tensor, previous_B: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The token after the next, drawn as the model will draw it."""
        age_B = np.minimum(self.age_B[rows], self.tokens_BT.shape[1] - 1)
        return self._draw(
            F.linear(ahead_BC, self.model.head.weight), rows, age_B, previous_B
        ).tokens_B.numpy()

    def _keep(self, rows: np.ndarray) -> None:
        super()._keep(rows)
        self.newest_B, self.draft_B = self.newest_B[rows], self.draft_B[rows]
