"""Contexts for attention: whole sequences packed end to end, or a cache with the next tokens of each row.

N tokens · B rows · T positions · H heads · K key/value heads · G queries a key head · D head size ·
S new tokens a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .attention import Layer
from .config import ModelConfig
from .ffn import Routes

# Tokens of a sequence beyond which it stands alone and does not share its prompt: torch's attention, which walks over keys
# in tiles, is ahead of ours there, and knows whole sequences only (`python -m bench.kernels`).
LONG = 3072


class Packed:
    """Sequences laid end to end, each causal and blind to the others.

    Only attention sees padding: rows are taken in order, in runs of like length (callers sort), each
    padded on the right to its longest; causality keeps padding out of every real position.
    """

    absorbed = False

    def __init__(self, lengths: Sequence[int], slack: float = 0.2, device: torch.device | str = "cpu"):
        self.lengths = list(lengths)
        self.positions = torch.cat([torch.arange(n) for n in self.lengths]).to(device)
        self.slack, self.device = slack, device
        self._last: tuple[Tensor, Tensor] | None = None
        self.entries: list[tuple[Tensor, Tensor | None]] | None = None
        self.routes: Routes | None = None

    @property
    def sequences(self) -> Tensor:
        """Which sequence each token is of."""
        return torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))

    @cached_property
    def _runs(self) -> _Runs:
        return _Runs(self.lengths, self.slack, device=self.device)

    @cached_property
    def _trees(self) -> kernels.Trees:
        return kernels.Trees(np.cumsum([0, *self.lengths[:-1]]), self.lengths)

    def keep(self) -> Packed:
        """Remember what every layer keeps of each token: a prefill."""
        self.entries = []
        return self

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor | None,
        v_NKD: Tensor | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        if k_NKD is None:
            k_NKD, v_NKD = self._last
        else:
            self._last = k_NKD, v_NKD
            if self.entries is not None:
                self.entries.append((k_NKD, v_NKD) if kept is None else (kept, None))
        if _compiled("attention", layer, max(self.lengths), q_NHD, v_NKD):
            return kernels.Attention.apply(q_NHD, k_NKD, v_NKD, self._trees, layer.scale, layer.window)
        runs = zip(*(self._runs.padded(x) for x in (q_NHD, k_NKD, v_NKD)), strict=True)
        return self._runs.joined([mix(layer, q, k, v) for q, k, v in runs])


class SharedPrefix:
    """Completions that branch off shared prompts; every prompt stands, and is computed, once.

    `prompts` prompts of `width` tokens come first, then the completions end to end (callers sort them by
    length); `owners[i]` is the prompt that completion i goes on from. What a completion sees is its whole
    prompt and its own past: gradients are those of the sequences written out in full.
    """

    absorbed = False

    def __init__(
        self, prompts: int, width: int, owners: Sequence[int], lengths: Sequence[int], slack: float = 0.2
    ):
        self.prompts, self.width = prompts, width
        first = next(
            (i for i, n in enumerate(lengths) if n), len(lengths)
        )  # an empty one has nothing to attend
        self.owners = torch.as_tensor(owners[first:], dtype=torch.long)
        self.lengths, self.slack = list(lengths[first:]), slack
        columns = [width + torch.arange(n) for n in self.lengths]
        self.positions = torch.cat([torch.arange(width).repeat(prompts), *columns])
        self._last: tuple[Tensor, Tensor] | None = None
        self.routes: Routes | None = None

    @property
    def sequences(self) -> Tensor:
        """Which prompt or completion each token is of."""
        lengths = [self.width] * self.prompts + self.lengths
        return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    @cached_property
    def _runs(self) -> _Runs:
        return _Runs(self.lengths, self.slack, self.prompts * self.width)

    @cached_property
    def _trees(self) -> kernels.Trees:
        begins = self.prompts * self.width + np.cumsum([0, *self.lengths])[:-1]
        order = self.owners.argsort(stable=True).numpy()
        counts = self.owners.bincount(minlength=self.prompts).tolist()
        trunks = np.arange(self.prompts) * self.width
        return kernels.Trees(
            trunks, [self.width] * self.prompts, counts, begins[order], np.asarray(self.lengths, int)[order]
        )

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor | None,
        v_NKD: Tensor | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        k_NKD, v_NKD = self._last = self._last if k_NKD is None else (k_NKD, v_NKD)
        if _compiled("branches", layer, self.width + max(self.lengths, default=0), q_NHD, v_NKD):
            return kernels.Attention.apply(q_NHD, k_NKD, v_NKD, self._trees, layer.scale, layer.window)
        head = self.prompts * self.width
        q_p, k_p, v_p = (
            x[:head].view(self.prompts, self.width, *x.shape[1:]).transpose(1, 2)
            for x in (q_NHD, k_NKD, v_NKD)
        )
        mixed_p = mix(layer, q_p, k_p, v_p).transpose(1, 2).flatten(0, 1)
        if not self._runs.cuts:
            return mixed_p
        mixed = []
        for (a, b), q, k, v in zip(
            self._runs.cuts, *(self._runs.padded(x) for x in (q_NHD, k_NKD, v_NKD)), strict=True
        ):
            owner = self.owners[a:b]
            mixed.append(mix(layer, q, torch.cat([k_p[owner], k], dim=2), torch.cat([v_p[owner], v], dim=2)))
        return torch.cat([mixed_p, self._runs.joined(mixed)])


def _compiled(operation: str, layer: Layer, longest: int, q_NHD: Tensor, v_NKD: Tensor) -> bool:
    seen = min(longest, layer.window or longest)
    return q_NHD.shape[2] == v_NKD.shape[2] and kernels.serves(operation, seen, q_NHD, v_NKD)


def mix(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last queries over all keys; heads may outnumber key heads."""
    width, seen = q.shape[2], k.shape[2]
    mask = None
    if seen > width or 0 < layer.window < seen:
        mask = torch.ones(width, seen, dtype=torch.bool, device=q.device).tril(seen - width)
        mask = mask.triu(seen - width - layer.window + 1) if layer.window else mask
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=layer.scale, enable_gqa=grouped
    )


class _Runs:
    """Rows laid end to end from token `offset`, in runs of like length, each padded on the right to its longest.

    All runs are padded by one gather a tensor, and one gather takes the padding out again.
    """

    def __init__(self, lengths: list[int], slack: float, offset: int = 0, device: torch.device | str = "cpu"):
        self.cuts = _cut(lengths, slack) if lengths else []
        self.shapes = [(b - a, max(lengths[a:b])) for a, b in self.cuts]
        self.begin, self.tokens = offset, sum(lengths)
        self.even = self.tokens == sum(rows * width for rows, width in self.shapes)
        if not self.even:
            begins_B, lengths_B = np.cumsum([0, *lengths[:-1]]), np.asarray(lengths)
            widths_B = np.repeat([width for _, width in self.shapes], [rows for rows, _ in self.shapes])
            column_P = np.arange(widths_B.sum()) - np.repeat(np.cumsum(widths_B) - widths_B, widths_B)
            inside_P = column_P < np.repeat(lengths_B, widths_B)
            pad_P = np.where(inside_P, np.repeat(begins_B, widths_B) + column_P, 0)
            self.pad, self.real = (torch.from_numpy(x).to(device) for x in (pad_P, inside_P.nonzero()[0]))

    def padded(self, x_NHD: Tensor) -> list[Tensor]:
        """[rows, H, width, D] of each run."""
        x_NHD = x_NHD.narrow(0, self.begin, self.tokens)
        padded_PHD = x_NHD if self.even else _Gather.apply(x_NHD, self.pad, self.real)
        runs = padded_PHD.split([rows * width for rows, width in self.shapes])
        return [
            run.view(*shape, *x_NHD.shape[1:]).transpose(1, 2)
            for run, shape in zip(runs, self.shapes, strict=True)
        ]

    def joined(self, mixed: list[Tensor]) -> Tensor:
        """Back to [N, H, D]."""
        flat = [run.transpose(1, 2).flatten(0, 1) for run in mixed]
        flat_PHD = flat[0] if len(flat) == 1 else torch.cat(flat)
        return flat_PHD if self.even else _Gather.apply(flat_PHD, self.real, None)


class _Gather(torch.autograd.Function):
    """x[index], where of all that an entry is gathered to one place alone, `back`, has a gradient: padding has none.

    Without `back` no entry is gathered twice.
    """

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.rows = len(x)
        ctx.save_for_backward(*((index,) if back is None else (index, back)))
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        index, *back = ctx.saved_tensors
        if back:
            return grad.index_select(0, back[0]), None, None
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None, None


def _cut(lengths: list[int], slack: float) -> list[tuple[int, int]]:
    """Cut rows into runs whose padding stays below `slack` of their tokens."""
    cuts, first, longest, total = [], 0, 0, 0
    for i, n in enumerate(lengths):
        widest = max(longest, n)
        if i > first and widest * (i - first + 1) > (1 + slack) * (total + n):
            cuts.append((first, i))
            first, widest, total = i, n, 0
        longest, total = widest, total + n
    return [*cuts, (first, len(lengths))]


class KVCache:
    """What the rows in flight keep of their tokens; a row's next tokens land at its own length.

    Values are stored as [layers, B, K, T, D], with room to grow; keys as [layers, B, K, T / P, D, P], so that one
    number of a query meets P of them side by side: all T, or as many as a vector holds where the kernels read them (`compiled`), one
    block after the other. MLA keeps its latents as keys of one head, and no values, for they are the latents' first part. `fork` copies a prefilled prompt into rows, `keep` drops finished rows, `rollback`
    takes tokens back. Attention looks at the longest row and no further. Rows of one prompt may all read the copy
    of the first of them (`prefix_owner`), which then stays near the processor. With `spare` there is room for so many rows
    from the start, as long as it holds no more than `spare_tokens`; the last rows then move into places that fall free,
    and the others stay where they are.
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
        self.config, self.dtype, self.device, self.compiled, self.ahead = (
            config,
            dtype,
            device,
            compiled,
            ahead,
        )
        self.spare, self.spare_tokens = spare, spare_tokens
        self.make = (
            torch.empty if compiled else torch.zeros
        )  # masked positions are multiplied by zero; kernels skip them
        self.heads, *self.widths = config.cache_widths
        self.k_LBKnDP, self.v_LBKTD = self._room(0, 0)
        self.lengths = self.shared = self._family = self._lenders = np.zeros(0, dtype=np.int64)
        self.positions = torch.zeros(0, dtype=torch.long, device=device)
        self.routes: Routes | None = None

    @property
    def prefix_owner(self) -> np.ndarray:
        """Of each row, the first one with the same prompt that still holds it."""
        if len(self._lenders) != len(self.lengths):
            rows, holds = np.arange(len(self.lengths)), self.shared > 0
            first = np.full(int(self._family.max()) + 1, len(rows))
            np.minimum.at(first, self._family[holds], rows[holds])
            self._lenders = np.where(holds, first[self._family], rows)
        return self._lenders

    def _room(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        first, (key, value) = (self.config.slots + self.config.predicted, rows, self.heads), self.widths
        block = kernels.lanes() if self.compiled else max(1, length)
        shapes = (*first, length // block, key, block), (*first, length, value)
        return tuple(self.make(shape, dtype=self.dtype, device=self.device) for shape in shapes)

    @property
    def bytes(self) -> int:
        return sum(store.numel() * store.element_size() for store in (self.k_LBKnDP, self.v_LBKTD))

    def fork(self, prefill: Packed, copies: Sequence[int]) -> None:
        """Add `copies[i]` rows that begin with the i-th prefilled sequence."""
        lengths, source = np.repeat(prefill.lengths, copies), np.repeat(np.arange(len(copies)), copies)
        old, new = len(self.lengths), len(source)
        self._reserve(old + new, max(prefill.lengths) + self.ahead, old)
        self.lengths, self.shared = np.append(self.lengths, lengths), np.append(self.shared, lengths)
        self._family = np.append(self._family, source + (self._family.max() + 1 if old else 0))
        begin = 0
        row = old
        for length, count in zip(prefill.lengths, copies, strict=True):
            for slot, (k, v) in enumerate(prefill.entries):
                keys_KnDP = self._blocks(k[begin : begin + length])
                self.k_LBKnDP[slot, row : row + count, :, : keys_KnDP.shape[1], :, : keys_KnDP.shape[3]] = (
                    keys_KnDP
                )
                if v is not None:
                    self.v_LBKTD[slot, row : row + count, :, :length] = v[begin : begin + length].transpose(
                        0, 1
                    )
            begin += length
            row += count

    def _blocks(self, k_TKD: Tensor) -> Tensor:
        """[K, n, D, P] of a sequence's keys, zeros behind the last."""
        block = min(self.k_LBKnDP.shape[-1], len(k_TKD))
        return (
            F.pad(k_TKD, (0, 0, 0, 0, 0, -len(k_TKD) % block)).unflatten(0, (-1, block)).permute(2, 0, 3, 1)
        )

    def keep(self, rows: np.ndarray) -> None:
        """Keep only these rows, in this order."""
        self.lengths, self.shared, self._family, self._lenders = (
            self.lengths[rows],
            self.shared[rows],
            self._family[rows],
            rows[:0],
        )
        if self.spare:
            return self._move(rows)
        kept = torch.from_numpy(rows).to(self.device)
        self.k_LBKnDP = self.k_LBKnDP.index_select(1, kept)  # one after the other: never two copies of both
        self.v_LBKTD = self.v_LBKTD.index_select(1, kept)

    def _move(self, rows: np.ndarray) -> None:
        """Row rows[i] into place i, where it is not there yet; `rows` takes nothing from a place that was written before."""
        for place in (rows != np.arange(len(rows))).nonzero()[0].tolist():
            row, length = int(rows[place]), int(self.lengths[place])
            blocks = -(-length // self.k_LBKnDP.shape[5])
            self.k_LBKnDP[:, place, :, :blocks] = self.k_LBKnDP[:, row, :, :blocks]
            self.v_LBKTD[:, place, :, :length] = self.v_LBKTD[:, row, :, :length]
        if not len(rows):
            self.k_LBKnDP, self.v_LBKTD = self._room(0, 0)  # what nobody needs goes back to the system

    def rest(self, idle_B: np.ndarray) -> None:
        """Set finished rows back to length 0, so that an idle row never passes the model's last position."""
        self.lengths = np.where(idle_B, 0, self.lengths)
        if (self.shared[idle_B] > 0).any():
            self.shared, self._lenders = np.where(idle_B, 0, self.shared), self.lengths[:0]

    def advance(self, count: int = 1) -> None:
        """Make room for `count` more tokens a row, and say where they land; call once before each step."""
        rows, width = len(self.lengths), int(self.lengths.max()) + count
        self._reserve(rows, width, rows)
        positions_BS = self.lengths[:, None] + np.arange(count)
        self.positions = torch.from_numpy(positions_BS.ravel()).to(self.device)
        self.lengths = self.lengths + count
        self._width = width
        self._rows = torch.from_numpy(np.repeat(np.arange(rows), count)).to(self.device)
        self._bias: dict[int, Tensor] = {}

    def _mask(self, window: int) -> Tensor:
        """[B*K, S*G, T] of zeros and -inf; for one new token a row the middle is 1 and broadcasts."""
        if window in self._bias:
            return self._bias[window]
        ahead_BST = torch.arange(self._width, device=self.device) - self.positions.view(
            len(self.lengths), -1, 1
        )
        hidden_BST = (ahead_BST > 0) | (ahead_BST <= -window) if window else ahead_BST > 0
        rows, count, width = hidden_BST.shape
        bias_BST = torch.zeros(hidden_BST.shape, dtype=self.dtype, device=self.device).masked_fill_(
            hidden_BST, float("-inf")
        )
        if count == 1:
            bias_XGT = bias_BST.repeat_interleave(self.heads, 0)
        else:
            groups = self.config.heads // self.heads
            bias_XGT = (
                bias_BST[:, None, :, None]
                .expand(rows, self.heads, count, groups, width)
                .reshape(rows * self.heads, -1, width)
            )
        self._bias[window] = bias_XGT
        return bias_XGT

    def rollback(self, tokens_B: np.ndarray) -> None:
        """Take back that many of each row's last tokens: what they left is written over."""
        self.lengths = self.lengths - tokens_B

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor | None,
        v_NKD: Tensor | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        rows = len(self.lengths)
        keys, values = self.k_LBKnDP[layer.slot, :rows], self.v_LBKTD[layer.slot, :rows]
        if k_NKD is not None:
            block = keys.shape[-1]
            keys[self._rows, :, self.positions // block, :, self.positions % block] = k_NKD
            if v_NKD is not None:
                values[self._rows, :, self.positions] = v_NKD
        count = len(q_NHD) // rows
        q_BSKGD = q_NHD.view(rows, count, self.heads, -1, q_NHD.shape[-1])
        q_XGD = q_BSKGD.transpose(1, 2).reshape(rows * self.heads, -1, q_NHD.shape[-1])
        k_XDT = keys.transpose(2, 3).flatten(3).flatten(0, 1)[..., : self._width]
        v_XTD = (
            values[:, :, : self._width].flatten(0, 1)
            if self.widths[1]
            else k_XDT[:, : self.config.latent.kv_rank].mT
        )
        scores_XGT = torch.baddbmm(self._mask(layer.window), q_XGD, k_XDT, alpha=layer.scale)
        mixed_XGD = torch.bmm(scores_XGT.softmax(-1), v_XTD)
        if count == 1:
            return mixed_XGD.view(rows, -1, v_XTD.shape[-1])
        mixed_BKSGD = mixed_XGD.view(rows, self.heads, count, -1, v_XTD.shape[-1])
        return mixed_BKSGD.transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def _reserve(self, rows: int, width: int, used: int) -> None:
        """Grow by half again where the room is too small; what the first `used` rows hold is kept."""
        have_rows, have_width = self.v_LBKTD.shape[1], self.v_LBKTD.shape[3]
        if rows <= have_rows and width <= have_width:
            return
        wide = (
            have_width if width <= have_width else -(-max(width, have_width * 3 // 2, 32) // 16) * 16
        )  # whole vectors
        keys, values = self._room(
            max(rows, min(self.spare, self.spare_tokens // wide) if self.spare else have_rows), wide
        )
        blocks, block = self.k_LBKnDP.shape[3], self.k_LBKnDP.shape[5]
        keys[:, :used, :, :blocks, :, :block], values[:, :used, :, :have_width] = (
            self.k_LBKnDP[:, :used],
            self.v_LBKTD[:, :used],
        )
        self.k_LBKnDP, self.v_LBKTD = keys, values
