"""Contexts for attention: whole sequences packed end to end, or a cache with one new token a row.

N tokens · B rows · T positions · H heads · K key/value heads · G queries a key head · D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import ModelConfig


class Packed:
    """Sequences laid end to end, each causal and blind to the others.

    Only attention sees padding: rows are taken in order, in chunks of like length (callers sort), each
    padded on the right to its longest; causality keeps padding out of every real position.
    """

    def __init__(self, lengths: Sequence[int], slack: float = 0.2, device: torch.device | str = "cpu"):
        self.lengths = list(lengths)
        self.positions = torch.cat([torch.arange(n) for n in self.lengths]).to(device)
        self._chunks = [_Chunk(self.lengths, a, b, device) for a, b in _cut(self.lengths, slack)]
        self.keys: list[Tensor] | None = None
        self.values: list[Tensor] | None = None

    def keep(self) -> Packed:
        """Remember every layer's keys and values: a prefill."""
        self.keys, self.values = [], []
        return self

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        if self.keys is not None:
            self.keys.append(k_NKD)
            self.values.append(v_NKD)
        mixed = [chunk.attend(q_NHD, k_NKD, v_NKD) for chunk in self._chunks]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


class Branched:
    """Completions that branch off shared prompts; every prompt stands, and is computed, once.

    `prompts` prompts of `width` tokens come first, then the completions end to end (callers sort them by
    length); `owners[i]` is the prompt that completion i goes on from. What a completion sees is its whole
    prompt and its own past: gradients are those of the sequences written out in full.
    """

    def __init__(self, prompts: int, width: int, owners: Sequence[int], lengths: Sequence[int], slack: float = 0.2):
        self.prompts, self.width = prompts, width
        first = next((i for i, n in enumerate(lengths) if n), len(lengths))  # an empty one has nothing to attend
        rows = list(lengths[first:])
        self.owners = torch.as_tensor(owners[first:], dtype=torch.long)
        self._cuts = _cut(rows, slack) if rows else []
        self._chunks = [_Chunk(rows, a, b, "cpu", prompts * width) for a, b in self._cuts]
        columns = [width + torch.arange(n) for n in rows]
        self.positions = torch.cat([torch.arange(width).repeat(prompts), *columns])

    def attend(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        head = self.prompts * self.width
        q_p, k_p, v_p = (x[:head].view(self.prompts, self.width, *x.shape[1:]).transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD))
        mixed = [_mix(q_p, k_p, v_p).transpose(1, 2).flatten(0, 1)]
        for (a, b), chunk in zip(self._cuts, self._chunks, strict=True):
            owner = self.owners[a:b]
            mixed.append(chunk.attend(q_NHD, k_NKD, v_NKD, (k_p[owner], v_p[owner])))
        return torch.cat(mixed)


def _mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention, or attention under a mask; heads may outnumber key heads."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class _Chunk:
    """Neighbouring sequences padded together: `pad` gathers [B*T] tokens, `real` finds them again."""

    def __init__(self, lengths: list[int], first: int, last: int, device: torch.device | str, offset: int = 0):
        mine = lengths[first:last]
        self.start = offset + sum(lengths[:first])
        self.rows, self.width, self.tokens = len(mine), max(mine), sum(mine)
        self.even = self.tokens == self.rows * self.width
        if not self.even:
            begins = torch.tensor([0, *mine[:-1]]).cumsum(0).unsqueeze(1)
            column, length = torch.arange(self.width).unsqueeze(0), torch.tensor(mine).unsqueeze(1)
            inside = column < length
            self.pad = torch.where(inside, begins + column, 0).flatten().to(device)
            self.real = inside.flatten().nonzero().squeeze(1).to(device)

    def attend(self, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, prompt: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = (self._rows(x.narrow(0, self.start, self.tokens)) for x in (q_NHD, k_NKD, v_NKD))
        mask = None
        if prompt is not None:
            seen = prompt[0].shape[2]
            k, v = torch.cat([prompt[0], k], dim=2), torch.cat([prompt[1], v], dim=2)
            mask = torch.ones(self.width, seen + self.width, dtype=torch.bool).tril(seen)
        flat = _mix(q, k, v, mask).transpose(1, 2).flatten(0, 1)
        return flat if self.even else flat[self.real]

    def _rows(self, x_NHD: Tensor) -> Tensor:
        padded = x_NHD if self.even else x_NHD[self.pad]
        return padded.view(self.rows, self.width, *padded.shape[1:]).transpose(1, 2)


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
    """Keys and values of the rows in flight; a row's next token lands at its own length.

    Storage is [layers, B, K, T, D] with room to grow; `fork` copies a prefilled prompt into rows,
    `keep` drops finished rows. Attention looks at the longest row's length and no further.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.config, self.dtype, self.device = config, dtype, device
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self.k_LBKTD = self.v_LBKTD = self._room(0, 0)
        self.positions = self.lengths

    def _room(self, rows: int, width: int) -> Tensor:
        shape = (self.config.layers, rows, self.config.kv_heads, width, self.config.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def bytes(self) -> int:
        return 2 * self.k_LBKTD.numel() * self.k_LBKTD.element_size()

    def fork(self, prefill: Packed, copies: Sequence[int]) -> None:
        """Add `copies[i]` rows that begin with the i-th prefilled sequence."""
        lengths = torch.tensor(prefill.lengths, device=self.device)
        source = torch.repeat_interleave(torch.arange(len(copies), device=self.device), torch.tensor(copies, device=self.device))
        old, new = len(self.lengths), len(source)
        self._reserve(old + new, int(lengths.max()), old)
        self.lengths = torch.cat([self.lengths, lengths[source]])
        begin = 0
        row = old
        for length, count in zip(prefill.lengths, copies, strict=True):
            for layer, (k, v) in enumerate(zip(prefill.keys, prefill.values, strict=True)):
                self.k_LBKTD[layer, row : row + count, :, :length] = k[begin : begin + length].transpose(0, 1)
                self.v_LBKTD[layer, row : row + count, :, :length] = v[begin : begin + length].transpose(0, 1)
            begin += length
            row += count

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self.lengths = self.lengths[rows]
        self.k_LBKTD, self.v_LBKTD = self.k_LBKTD.index_select(1, rows), self.v_LBKTD.index_select(1, rows)

    def rest(self, idle_B: Tensor) -> None:
        """Rows that nobody reads any more begin again at 0: left to grow, they would outgrow the model's positions."""
        self.lengths = self.lengths.masked_fill(idle_B, 0)

    def advance(self) -> None:
        """Make room for one more token a row, and say where it lands; call once before each step."""
        width = int(self.lengths.max()) + 1
        self._reserve(len(self.lengths), width, len(self.lengths))
        self.positions = self.lengths
        self.lengths = self.lengths + 1
        self._width = width
        self._rows = torch.arange(len(self.lengths), device=self.device)
        beyond_BT = torch.arange(width, device=self.device) > self.positions.unsqueeze(1)
        bias_BT = torch.zeros(beyond_BT.shape, dtype=self.dtype, device=self.device).masked_fill_(beyond_BT, float("-inf"))
        self._bias = bias_BT.repeat_interleave(self.config.kv_heads, 0).unsqueeze(1)

    def attend(self, layer: int, q_BHD: Tensor, k_BKD: Tensor, v_BKD: Tensor) -> Tensor:
        keys, values = self.k_LBKTD[layer], self.v_LBKTD[layer]
        keys[self._rows, :, self.positions] = k_BKD
        values[self._rows, :, self.positions] = v_BKD
        rows, kv_heads, head_dim = k_BKD.shape
        q_XGD = q_BHD.reshape(rows * kv_heads, -1, head_dim)
        k_XTD = keys[:, :, : self._width].flatten(0, 1)
        v_XTD = values[:, :, : self._width].flatten(0, 1)
        scores_XGT = torch.baddbmm(self._bias, q_XGD, k_XTD.transpose(1, 2), alpha=head_dim**-0.5)
        return torch.bmm(scores_XGT.softmax(-1), v_XTD).view(rows, -1, head_dim)

    def _reserve(self, rows: int, width: int, used: int) -> None:
        """Grow by half again where the room is too small; what the first `used` rows hold is kept."""
        have_rows, have_width = self.k_LBKTD.shape[1], self.k_LBKTD.shape[3]
        if rows <= have_rows and width <= have_width:
            return
        wide = have_width if width <= have_width else max(width, have_width * 3 // 2, 32)
        for name in ("k_LBKTD", "v_LBKTD"):
            old, new = getattr(self, name), self._room(max(rows, have_rows), wide)
            new[:, :used, :, :have_width] = old[:, :used]
            setattr(self, name, new)
