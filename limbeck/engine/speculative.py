"""Speculative decoding with the model's own multi-token prediction (MTP) module (DeepSeek-V3, arXiv
2412.19437, section 5.4.3).

Each step runs a row's newest token together with a draft of the token after it. (A row is one sequence that
is being sampled.) The draft is drawn with the same random number as the real token will be, so that the two
often agree. A draft is accepted only if the model itself draws the same token, so the completion equals that
of plain decoding token by token, whatever the quality of the drafts.

Dimensions: N packed tokens · B rows · S tokens of a row in one step (2) · C hidden · T tokens of a completion
· V vocabulary · L sparse (mixture-of-experts) layers · K experts chosen per token.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.decoder import Decoder
from ..model.kv_cache import Packed
from .decode_batch import DecodeBatch, FinishedSequence
from .sampling import SamplingParams


class Speculation(DecodeBatch):
    """A decode batch that samples up to two tokens per row and step. The last token of a prompt is not
    prefilled but run by the first step, together with a draft. `drafted` counts the drafts that were checked,
    `accepted` those that the model drew too."""

    tokens_deferred = 1
    compiled = False  # the compiled step runs one token a row

    def __init__(self, model: Decoder, end_id: int, sampling: SamplingParams):
        super().__init__(model, end_id, sampling)
        self.newest_B = np.zeros(0, dtype=np.int64)
        self.draft_B = np.zeros(0, dtype=np.int64)
        self.drafted = 0
        self.accepted = 0

    def _prefill(self, prompts: list[np.ndarray], n: int) -> None:
        lengths = [len(prompt) - 1 for prompt in prompts]
        prefill = Packed(lengths).keep()
        tokens_N = torch.from_numpy(np.concatenate([prompt[:-1] for prompt in prompts]))
        hidden_NC = self._forward(tokens_N, prefill)
        next_N = torch.from_numpy(np.concatenate([prompt[1:] for prompt in prompts]))
        routes = prefill.routes
        prefill.routes = None  # the experts of the MTP module are not recorded
        ahead_NC = self.model.predict_next(hidden_NC, next_N, prefill)
        prefill.routes = routes
        last_tokens = torch.tensor(lengths).cumsum(0) - 1
        newest_B = np.repeat([int(prompt[-1]) for prompt in prompts], n)
        new_rows = np.arange(self.busy - len(newest_B), self.busy)
        draft_B = self._draft(ahead_NC[last_tokens].repeat_interleave(n, 0), newest_B, new_rows)
        self.newest_B = np.append(self.newest_B, newest_B)
        self.draft_B = np.append(self.draft_B, draft_B)
        self.hidden_BC = self.hidden_BC.new_zeros(self.busy, self.hidden_BC.shape[1])
        self._fork(prefill, lengths, n)

    def step(self) -> list[FinishedSequence]:
        """Run each row's newest token and draft, sample one or two tokens per row, draft the next token, and
        return the finished sequences."""
        hidden_BSC = self._run_pairs()
        first_B = self._sample(hidden_BSC[:, 0], self.alive_B)
        unfinished_B = ~self.is_stop_V[first_B] & (self.sampled_B < self.sampling.max_new_tokens)
        verified_B = self.alive_B & unfinished_B
        accepted_B = verified_B & (first_B == self.draft_B)
        self.drafted += int(verified_B.sum())
        self.accepted += int(accepted_B.sum())
        second_B = self._sample(hidden_BSC[:, 1], accepted_B)
        self._draft_next(hidden_BSC, np.stack([first_B, second_B], 1), accepted_B)
        return self._remove_finished()

    def _run_pairs(self) -> Tensor:
        """Run each row's newest token and draft through the model and return their hidden states [B, S,
        C]."""
        self.cache.reset_idle(~self.alive_B)
        self.cache.advance(2)
        tokens_BS = np.stack([self.newest_B, self.draft_B], 1)
        hidden_NC = self._forward(torch.from_numpy(tokens_BS.ravel()), self.cache)
        if self.sparse_layers:
            self._record_routes()
        return hidden_NC.view(self.busy, 2, -1)

    def _record_routes(self) -> None:
        """Record the experts chosen for both tokens of each row. Those of a rejected draft are overwritten in
        the next step."""
        rows = np.arange(self.busy)
        _, places, *layers_and_experts = self.routes_BTLK.shape
        chosen_NLK = torch.stack(self.cache.routes.chosen, 1)
        chosen_BSLK = chosen_NLK.view(self.busy, 2, *layers_and_experts).numpy()
        for i in range(2):
            place_B = np.minimum(self.sampled_B + i, places - 1)
            self.routes_BTLK[rows, place_B] = chosen_BSLK[:, i]

    def _draft_next(self, hidden_BSC: Tensor, sampled_BS: np.ndarray, accepted_B: np.ndarray) -> None:
        """Draft the token after each row's last sampled token, and remove rejected drafts from the KV cache.
        `sampled_BS` has the two tokens sampled in this step, of which the second is valid where `accepted_B`
        is True."""
        rows = np.arange(self.busy)
        self.cache.routes = None
        next_N = torch.from_numpy(sampled_BS.ravel())
        ahead_NC = self.model.predict_next(hidden_BSC.flatten(0, 1), next_N, self.cache)
        ahead_BSC = ahead_NC.view_as(hidden_BSC)
        self.cache.rollback(~accepted_B)
        self.newest_B = np.where(accepted_B, sampled_BS[:, 1], sampled_BS[:, 0])
        last_BC = ahead_BSC[torch.from_numpy(rows), torch.from_numpy(accepted_B).long()]
        self.draft_B = self._draft(last_BC, self.newest_B, rows)

    def _draft(self, ahead_BC: Tensor, previous_B: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the drafts [B]: tokens drawn from the MTP module's hidden states `ahead_BC`, with the random
        numbers with which the model will draw the real tokens. `previous_B` are the tokens before them."""
        place_B = np.minimum(self.sampled_B[rows], self.tokens_BT.shape[1] - 1)
        logits_BV = F.linear(ahead_BC, self.model.head.weight)
        return self._draw(logits_BV, rows, place_B, previous_B).tokens_B.numpy()

    def _select_rows(self, rows: np.ndarray) -> None:
        super()._select_rows(rows)
        self.newest_B = self.newest_B[rows]
        self.draft_B = self.draft_B[rows]
