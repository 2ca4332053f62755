"""The KV cache of a decode batch: keys and values of every row, and the attention of the next tokens to them.

A row: one sequence that is being decoded. A slot: the index of a layer's keys and values; layers that share
them share the slot. L slots · B rows · N new tokens of all rows · S new tokens of one row · T positions · n
blocks of P positions · H heads · K key/value heads · G query heads of each key head · D head size · X = B x
K.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .config import ModelConfig
from .context import Layer, RouterTrace
from .ops.table import Latents
from .packed import Packed


class KVCache:
    """The keys and values of a decode batch; each row's next tokens are stored at that row's own length.

    Values are stored as [L, B, K, T, D], where T includes room to grow; keys as [L, B, K, T / P, D, P], so
    that P keys lie side by side for each dimension of a query. P is T, or, if the compiled kernels read the
    cache (`compiled`), the number of float32 values in a vector register. For MLA the latents are stored as
    the keys of a single head and there are no values, as these are the first part of the latents.

    `fork` copies prefilled sequences into new rows, `select_rows` drops finished rows, `rollback` removes a
    row's last tokens. Attention reads up to the length of the longest row. Rows with the same prompt may all
    read the prompt from the first of these rows (`prefix_owner`), which keeps it in the processor's caches.

    `ahead` is the number of tokens to reserve after a prompt. With `spare`, memory for that many rows is
    allocated from the start, but for no more than `spare_tokens` tokens in total; when rows are dropped, the
    last rows then move into the free places and the others stay where they are.
    """

    absorbed = True

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        compiled: bool = False,
        ahead: int = 32,
        spare: int = 0,
        spare_tokens: int = 0,
    ):
        self.config = config
        self.dtype = dtype
        self.device = device
        self.compiled = compiled
        self.ahead = ahead
        self.spare = spare
        self.spare_tokens = spare_tokens
        self.heads, *self.widths = config.cache_widths
        self.k_LBKnDP, self.v_LBKTD = self._allocate(0, 0)
        self.lengths = np.zeros(0, dtype=np.int64)
        self.shared = np.zeros(0, dtype=np.int64)  # tokens of each row's prompt, 0 once it is overwritten
        self._prompts = np.zeros(0, dtype=np.int64)  # the number of each row's prompt
        self._owners = np.zeros(0, dtype=np.int64)  # `prefix_owner`, empty when it has to be found anew
        self.positions = torch.zeros(0, dtype=torch.long, device=device)
        self.routes: RouterTrace | None = None

    @property
    def prefix_owner(self) -> np.ndarray:
        """For each row, the index of the first row with the same prompt that still holds that prompt, [B]."""
        if len(self._owners) != len(self.lengths):
            rows_B = np.arange(len(self.lengths))
            holds_B = self.shared > 0
            first = np.full(int(self._prompts.max()) + 1, len(rows_B))
            np.minimum.at(first, self._prompts[holds_B], rows_B[holds_B])
            self._owners = np.where(holds_B, first[self._prompts], rows_B)
        return self._owners

    @property
    def bytes(self) -> int:
        """The bytes of memory of keys and values, including the room to grow."""
        return sum(store.numel() * store.element_size() for store in (self.k_LBKnDP, self.v_LBKTD))

    # ------------------------------------------------------------ rows

    def fork(self, prefill: Packed, copies: Sequence[int]) -> None:
        """Add `copies[i]` rows that begin with the i-th sequence of `prefill`."""
        old = len(self.lengths)
        source = np.repeat(np.arange(len(copies)), copies)
        lengths = np.repeat(prefill.lengths, copies)
        self._reserve(old + len(source), max(prefill.lengths) + self.ahead, old)
        first_prompt = self._prompts.max() + 1 if old else 0
        self.lengths = np.append(self.lengths, lengths)
        self.shared = np.append(self.shared, lengths)
        self._prompts = np.append(self._prompts, source + first_prompt)
        begin = 0
        row = old
        for length, count in zip(prefill.lengths, copies, strict=True):
            self._copy_in(prefill, slice(begin, begin + length), slice(row, row + count))
            begin += length
            row += count

    def _copy_in(self, prefill: Packed, tokens: slice, rows: slice) -> None:
        """Copy one prefilled sequence, the tokens `tokens` of `prefill`, into each of the rows `rows`."""
        length = tokens.stop - tokens.start
        for slot, (k_NKD, v_NKD) in enumerate(prefill.entries):
            keys_KnDP = self._blocks(k_NKD[tokens])
            _, blocks, _, block = keys_KnDP.shape
            self.k_LBKnDP[slot, rows, :, :blocks, :, :block] = keys_KnDP
            if v_NKD is not None:
                self.v_LBKTD[slot, rows, :, :length] = v_NKD[tokens].transpose(0, 1)

    def _blocks(self, k_TKD: Tensor) -> Tensor:
        """Return one sequence's keys in blocks of P positions, [K, n, D, P], padded with zeros."""
        block = min(self.k_LBKnDP.shape[-1], len(k_TKD))
        padded_TKD = F.pad(k_TKD, (0, 0, 0, 0, 0, -len(k_TKD) % block))
        return padded_TKD.unflatten(0, (-1, block)).permute(2, 0, 3, 1)

    def select_rows(self, rows: np.ndarray) -> None:
        """Keep only the rows with these indices, in this order, and drop all others."""
        self.lengths = self.lengths[rows]
        self.shared = self.shared[rows]
        self._prompts = self._prompts[rows]
        self._owners = rows[:0]
        if self.spare:
            self._move(rows)
            return
        index = torch.from_numpy(rows).to(self.device)
        self.k_LBKnDP = self.k_LBKnDP.index_select(1, index)  # one after the other: never two copies of both
        self.v_LBKTD = self.v_LBKTD.index_select(1, index)

    def _move(self, rows: np.ndarray) -> None:
        """Copy row `rows[i]` to row i, for every i where the two differ.

        `rows` must not name a row that an earlier copy has overwritten.
        """
        moved = (rows != np.arange(len(rows))).nonzero()[0]
        for place in moved.tolist():
            row = int(rows[place])
            length = int(self.lengths[place])
            blocks = -(-length // self.k_LBKnDP.shape[5])
            self.k_LBKnDP[:, place, :, :blocks] = self.k_LBKnDP[:, row, :, :blocks]
            self.v_LBKTD[:, place, :, :length] = self.v_LBKTD[:, row, :, :length]
        if not len(rows):
            self.k_LBKnDP, self.v_LBKTD = self._allocate(0, 0)  # an idle cache gives its memory back

    def reset_idle(self, idle_B: np.ndarray) -> None:
        """Set the length of finished rows to 0, so that they never pass the model's last position.

        `idle_B` is True for the finished rows.
        """
        self.lengths = np.where(idle_B, 0, self.lengths)
        if (self.shared[idle_B] > 0).any():
            self.shared = np.where(idle_B, 0, self.shared)
            self._owners = self.lengths[:0]

    # ------------------------------------------------------------ steps

    def advance(self, count: int = 1) -> None:
        """Make room for `count` more tokens per row and set their positions; call once before each step."""
        rows = len(self.lengths)
        width = int(self.lengths.max()) + count
        self._reserve(rows, width, rows)
        positions_BS = self.lengths[:, None] + np.arange(count)
        rows_N = np.repeat(np.arange(rows), count)
        self.positions = torch.from_numpy(positions_BS.ravel()).to(self.device)
        self.lengths = self.lengths + count
        self._width = width
        self._rows = torch.from_numpy(rows_N).to(self.device)
        self._masks: dict[int, Tensor] = {}  # masks of this step, by window

    def rollback(self, tokens_B: np.ndarray) -> None:
        """Remove the last `tokens_B[i]` tokens of each row i; the next tokens overwrite them."""
        self.lengths = self.lengths - tokens_B

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor | None,
        v_NKD: Tensor | None,
        latents: Latents | None = None,
    ) -> Tensor:
        """Store the new keys and values; return the new tokens' attention in their rows, [N, H, D].

        If `k_NKD` is None, nothing is stored: the layer uses the keys and values of an earlier layer.
        """
        if k_NKD is not None:
            self._store(layer.slot, k_NKD, v_NKD)
        rows = len(self.lengths)
        count = len(q_NHD) // rows
        width = q_NHD.shape[-1]
        q_BSKGD = q_NHD.view(rows, count, self.heads, -1, width)
        q_XGD = q_BSKGD.transpose(1, 2).reshape(rows * self.heads, -1, width)
        k_XDT, v_XTD = self._keys_and_values(layer.slot)
        scores_XGT = torch.baddbmm(self._mask(layer.window), q_XGD, k_XDT, alpha=layer.scale)
        mixed_XGD = torch.bmm(scores_XGT.softmax(-1), v_XTD)
        if count == 1:
            return mixed_XGD.view(rows, -1, v_XTD.shape[-1])
        mixed_BKSGD = mixed_XGD.view(rows, self.heads, count, -1, v_XTD.shape[-1])
        return mixed_BKSGD.transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def _store(self, slot: int, k_NKD: Tensor, v_NKD: Tensor | None) -> None:
        """Write the keys and values of this step's new tokens into one slot."""
        rows = len(self.lengths)
        keys_BKnDP = self.k_LBKnDP[slot, :rows]
        block = keys_BKnDP.shape[-1]
        keys_BKnDP[self._rows, :, self.positions // block, :, self.positions % block] = k_NKD
        if v_NKD is not None:
            self.v_LBKTD[slot, :rows][self._rows, :, self.positions] = v_NKD

    def _keys_and_values(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return the keys [X, D, T] and values [X, T, D] of one slot, up to the length of the longest row."""
        rows = len(self.lengths)
        keys_BKnDP = self.k_LBKnDP[slot, :rows]
        k_XDT = keys_BKnDP.transpose(2, 3).flatten(3).flatten(0, 1)[..., : self._width]
        if self.config.latent:
            return k_XDT, k_XDT[:, : self.config.latent.kv_rank].mT
        return k_XDT, self.v_LBKTD[slot, :rows, :, : self._width].flatten(0, 1)

    def _mask(self, window: int) -> Tensor:
        """Return the mask to add to the scores, zeros and -inf, [X, S x G, T].

        With one new token per row the mask is [X, 1, T]. The mask of each `window` is computed once in a
        step.
        """
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int) -> Tensor:
        """Compute `_mask` for one window, [X, S x G, T], or [X, 1, T] for one new token per row."""
        positions_BS1 = self.positions.view(len(self.lengths), -1, 1)
        ahead_BST = torch.arange(self._width, device=self.device) - positions_BS1
        hidden_BST = ahead_BST > 0
        if window:
            hidden_BST = hidden_BST | (ahead_BST <= -window)
        zeros_BST = torch.zeros(hidden_BST.shape, dtype=self.dtype, device=self.device)
        mask_BST = zeros_BST.masked_fill_(hidden_BST, float("-inf"))
        rows, count, width = mask_BST.shape
        if count == 1:
            return mask_BST.repeat_interleave(self.heads, 0)
        groups = self.config.heads // self.heads
        mask_BKSGT = mask_BST[:, None, :, None].expand(rows, self.heads, count, groups, width)
        return mask_BKSGT.reshape(rows * self.heads, -1, width)

    # ------------------------------------------------------------ memory

    def _allocate(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Return new tensors for the keys and for the values of `rows` rows of `length` positions."""
        layers = self.config.slots + self.config.predicted
        key, value = self.widths
        block = kernels.lanes() if self.compiled else max(1, length)
        # torch multiplies masked positions by zero, which must not meet NaN; the kernels skip them
        make = torch.empty if self.compiled else torch.zeros
        keys_shape = (layers, rows, self.heads, length // block, key, block)
        values_shape = (layers, rows, self.heads, length, value)
        keys = make(keys_shape, dtype=self.dtype, device=self.device)
        values = make(values_shape, dtype=self.dtype, device=self.device)
        return keys, values

    def _reserve(self, rows: int, width: int, used: int) -> None:
        """Allocate larger tensors if there is no room for `rows` rows of `width` positions.

        If positions are lacking, their number grows by at least half. The first `used` rows are copied to the
        new tensors.
        """
        _, have_rows, _, have_width, _ = self.v_LBKTD.shape
        if rows <= have_rows and width <= have_width:
            return
        wide = have_width
        if width > have_width:
            wanted = max(width, have_width * 3 // 2, 32)
            wide = -(-wanted // 16) * 16  # whole vectors
        least = min(self.spare, self.spare_tokens // wide) if self.spare else have_rows
        keys, values = self._allocate(max(rows, least), wide)
        blocks = self.k_LBKnDP.shape[3]
        block = self.k_LBKnDP.shape[5]
        keys[:, :used, :, :blocks, :, :block] = self.k_LBKnDP[:, :used]
        values[:, :used, :, :have_width] = self.v_LBKTD[:, :used]
        self.k_LBKnDP = keys
        self.v_LBKTD = values
