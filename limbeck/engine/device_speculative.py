"""Speculative decoding on a device: a step samples up to two tokens a row, and waits for nothing.

As on the CPU (`speculative.py`), the model's module of multi-token prediction (MTP) drafts each row's next
token with the random number of the real one, and a draft is accepted only if the model draws it too, so
completions are those of plain decoding. A draft that is not accepted stays in the cache beyond the row's
length, where nothing reads it before the next token is written over it. N = B x S tokens of a step · B rows ·
S tokens of a row in one step (2) · C hidden size · V vocabulary · L layers with experts · K experts of a
token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .device_batch import DeviceBatch, RowState, write


class DeviceSpeculation(DeviceBatch):
    """A device batch that runs each row's newest token together with a draft of the token after it.

    Of the state, `previous_B` are the newest tokens, which are not in the cache yet, and `hidden_BC` the
    states of the MTP module that the drafts are drawn from. The last token of a prompt is prefilled for the
    draft's sake alone: the first step runs it again, so it is in a block of the row's own.
    """

    tokens_per_step = 2
    modules = 1

    def _make_constants(self, rows: int) -> None:
        super()._make_constants(rows)
        self._counts = torch.zeros(2, dtype=torch.long, device=self.device)

    @property
    def drafted(self) -> int:
        """The number of drafts that were checked."""
        return int(self._counts[0])

    @property
    def accepted(self) -> int:
        """The number of drafts that the model drew too."""
        return int(self._counts[1])

    def reset_counts(self) -> None:
        """Count tokens and drafts from zero again."""
        super().reset_counts()
        self._counts.zero_()

    # ------------------------------------------------------------ admission

    def admit(
        self,
        prompts: Sequence[tuple[int, np.ndarray]],
        uniforms_BT: np.ndarray,
        n: int,
        limits: Sequence[int] | None = None,
    ) -> None:
        """Prefill prompts and fork each into `n` rows; arguments as in `DeviceBatch.admit`."""
        new = slice(self.busy, self.busy + n * len(prompts))
        super().admit(prompts, uniforms_BT, n, limits)
        newest_B = np.repeat([tokens[-1] for _, tokens in prompts], n)
        self.state.previous_B[new] = self._to_device(newest_B, torch.long)
        self.state.lengths_B[new] -= 1

    @staticmethod
    def needed(prompt: int, n: int, limit: int) -> int:
        """Return the blocks of `n` rows; the last token of their prompt lies in a block of each row's own."""
        return DeviceBatch.needed(prompt - 1, n, limit + 1)

    def _take(self, prompt: int, n: int, limit: int, known: Sequence[int] = ()) -> list[list[int]]:
        return super()._take(prompt - 1, n, limit + 1, known)

    def _copy_prompts(self, lengths: np.ndarray, first: int, n: int) -> None:
        super()._copy_prompts(lengths - 1, first, n)

    def _prefill(self, prompts: list[np.ndarray], table: np.ndarray) -> Tensor:
        """Run prompts through the model and the MTP module, into the blocks of `table`; return the states
        [B, C] that the first drafts are drawn from."""
        lengths = np.array([len(tokens) for tokens in prompts])
        hidden_NC = self._run(prompts, table, np.zeros_like(lengths))
        next_N = np.concatenate([np.append(tokens[1:], tokens[-1]) for tokens in prompts])
        ahead_NC = self._predict(hidden_NC, self._to_device(next_N, torch.long))
        before_last = lengths.cumsum() - np.minimum(lengths, 2)  # a prompt of one token has but that
        return ahead_NC[self._to_device(before_last, torch.long)]

    def _predict(self, hidden_NC: Tensor, next_N: Tensor) -> Tensor:
        """Return the states [N, C] of the MTP module for the tokens that were run last and those that follow
        them; its experts are not recorded."""
        routes = self.cache.routes
        self.cache.routes = None
        ahead_NC = self.model.predict_next(hidden_NC, next_N, self.cache)
        self.cache.routes = routes
        return ahead_NC

    # ------------------------------------------------------------ steps

    def _step(self, rows: int) -> None:
        """Sample one or two tokens for each of the first `rows` rows, in place."""
        state = self.state.first(rows)
        place_BS = (state.sampled_B.unsqueeze(1) + self._step_S).clamp(max=state.tokens_BT.shape[1] - 1)
        uniform_BS = state.uniforms_BT.gather(1, place_BS)
        before_B = state.previous_B.masked_fill(state.sampled_B == 0, 0)  # a prompt forces nothing
        draft_B = self._draw(state.hidden_BC, uniform_BS[:, 0].contiguous(), before_B).tokens_B
        hidden_NC = self._run_pairs(state, draft_B)
        before_N = torch.stack([before_B, draft_B], 1).flatten()
        drawn = self._draw(hidden_NC, uniform_BS.flatten(), before_N)
        self._keep_mask(drawn.kept_BV)
        tokens_BS = drawn.tokens_B.view_as(place_BS)
        accepted_B = self._verify(state, tokens_BS[:, 0], draft_B)
        for i, valid_B in enumerate((state.alive_B, accepted_B)):
            write(state.tokens_BT, place_BS[:, i : i + 1], drawn.tokens_B[i::2], valid_B)
            write(state.logprobs_BT, place_BS[:, i : i + 1], drawn.logprobs_B[i::2], valid_B)
        self._go_on(state, tokens_BS, accepted_B)
        ahead_BSC = self._predict(hidden_NC, drawn.tokens_B).view(rows, 2, -1)
        state.hidden_BC.copy_(torch.where(accepted_B.unsqueeze(1), ahead_BSC[:, 1], ahead_BSC[:, 0]))

    def _run_pairs(self, state: RowState, draft_B: Tensor) -> Tensor:
        """Run each row's newest token and its draft through the model; return their hidden states [N, C]."""
        self._lay(state)
        hidden_NC = self._forward(torch.stack([state.previous_B, draft_B], 1).flatten())
        if self.sparse_layers:
            self._record_routes(state)
        return hidden_NC

    def _record_routes(self, state: RowState) -> None:
        """Record the experts that both tokens of each row chose. Those of the prompt's last token are known
        already, and those of a draft take their place."""
        chosen_NLK = torch.stack(self.cache.routes.chosen, 1).short()
        chosen_BSLK = chosen_NLK.unflatten(0, (-1, 2))
        last = state.routes_BTLK.shape[1] - 1
        for i in range(2):
            chosen_B1LK = chosen_BSLK[:, i : i + 1]
            place_B1 = (state.sampled_B - 1 + i).clamp(0, last).view(-1, 1, 1, 1)
            state.routes_BTLK.scatter_(1, place_B1.expand_as(chosen_B1LK), chosen_B1LK)

    def _verify(self, state: RowState, first_B: Tensor, draft_B: Tensor) -> Tensor:
        """Return which drafts are accepted, [B]: those of rows that go on after the first token, and that are
        the same; count them."""
        goes_on_B = ~self.is_stop_V[first_B] & (state.sampled_B + 1 < state.limits_B)
        verified_B = state.alive_B & goes_on_B
        accepted_B = verified_B & (first_B == draft_B)
        self._counts.add_(torch.stack([verified_B.sum(), accepted_B.sum()]))
        return accepted_B

    def _go_on(self, state: RowState, tokens_BS: Tensor, accepted_B: Tensor) -> None:
        """Count the tokens of each row, of which the second is valid where `accepted_B` is True, and end the
        rows that are done. The others have one or two tokens more in the cache."""
        newest_B = torch.where(accepted_B, tokens_BS[:, 1], tokens_BS[:, 0])
        state.previous_B.copy_(torch.where(state.alive_B, newest_B, state.previous_B))
        state.sampled_B.add_(state.alive_B).add_(accepted_B)
        ended_B = self.is_stop_V[newest_B] | (state.sampled_B >= state.limits_B)
        state.alive_B.logical_and_(~ended_B)
        state.lengths_B.add_(state.alive_B).add_(state.alive_B & accepted_B)
