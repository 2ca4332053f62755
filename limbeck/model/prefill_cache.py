"""Chunked prefill: the cached keys and values of one sequence, and the attention of its next tokens to them.

A slot is the index of one layer's keys and values in the cache. N tokens of all sequences · T positions of
one sequence · H heads · K key/value heads · D head size · S new tokens of one sequence · n blocks of P
positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import ModelConfig
from .context import Layer, RouterTrace
from .kv_cache import KVCache
from .ops.plain import causal_attention
from .ops.table import Latents


class SequenceKV:
    """The cached keys [T, K, D] and values [T, K, D] of one sequence, slot by slot; with MLA the latents.

    `ChunkedPrefill` appends tokens to it. Rows of a `KVCache` can start as copies of it (`KVCache.fork`), and
    another sequence with the same first tokens can copy them from it (`copy_prefix`). `room` is the number of
    tokens that it can hold; it never grows beyond.
    """

    def __init__(self, config: ModelConfig, room: int, dtype: torch.dtype = torch.float32):
        heads, key, value = config.cache_widths
        self.length = 0
        self.latent = config.latent
        self.kept: list[tuple[Tensor, Tensor | None]] = []
        for _ in range(config.slots):
            k_TKD = torch.empty(room, heads, key, dtype=dtype)
            v_TKD = torch.empty(room, heads, value, dtype=dtype) if value else None
            self.kept.append((k_TKD, v_TKD))

    @property
    def lengths(self) -> list[int]:
        """A list with the length of this one sequence in tokens, in the form that `KVCache.fork` reads."""
        return [self.length]

    @property
    def entries(self) -> list[tuple[Tensor, Tensor | None]]:
        """The keys and values of the tokens so far, slot by slot, in the form that `KVCache.fork` reads."""
        filled = []
        for k_TKD, v_TKD in self.kept:
            values = None if v_TKD is None else v_TKD[: self.length]
            filled.append((k_TKD[: self.length], values))
        return filled

    @property
    def bytes(self) -> int:
        """The bytes of memory of the whole room, including the part that is not used yet."""
        tensors = [tensor for pair in self.kept for tensor in pair if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @classmethod
    def of(cls, cache: KVCache, row: int, length: int) -> SequenceKV:
        """Return a copy of the keys and values of the first `length` tokens of row `row` of `cache`."""
        past = cls(cache.config, length, cache.dtype)
        past.length = length
        for slot, (k_TKD, v_TKD) in enumerate(past.kept):
            blocks_KnDP = cache.k_LBKnDP[slot, row]
            k_TKD.copy_(blocks_KnDP.permute(1, 3, 0, 2).flatten(0, 1)[:length])
            if v_TKD is not None:
                v_TKD.copy_(cache.v_LBKTD[slot, row, :, :length].transpose(0, 1))
        return past

    def copy_prefix(self, other: SequenceKV, length: int) -> None:
        """Replace the contents of this sequence by the first `length` tokens of `other`."""
        self.length = length
        for mine, theirs in zip(self.kept, other.kept, strict=True):
            for target_TKD, source_TKD in zip(mine, theirs, strict=True):
                if target_TKD is not None:
                    target_TKD[:length] = source_TKD[:length]


class ChunkedPrefill:
    """The attention context of the next tokens of several sequences, which are concatenated.

    The first `counts[0]` tokens continue `sequences_kv[0]`, the next `counts[1]` tokens continue
    `sequences_kv[1]`, and so on. Each token attends to the earlier tokens of its own sequence. After the
    forward pass the caller adds the new tokens to the sequences' `length`.
    """

    absorbed = True

    def __init__(self, sequences_kv: Sequence[SequenceKV], counts: Sequence[int]):
        self.sequences_kv = list(sequences_kv)
        self.counts = list(counts)
        positions = [
            torch.arange(past.length, past.length + count)
            for past, count in zip(self.sequences_kv, self.counts, strict=True)
        ]
        self.positions = torch.cat(positions)
        self.routes: RouterTrace | None = None

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor | None,
        v_NKD: Tensor | None,
        latents: Latents | None = None,
    ) -> Tensor:
        """Store the new keys and values; return the new tokens' attention in their sequences, [N, H, D].

        If `k_NKD` is None, nothing is stored: the layer uses the keys and values of an earlier layer.
        """
        mixed = []
        begin = 0
        for past, count in zip(self.sequences_kv, self.counts, strict=True):
            new = slice(begin, begin + count)
            if k_NKD is not None:
                _store(past, layer.slot, k_NKD[new], None if v_NKD is None else v_NKD[new])
            mixed.append(_attend(past, layer, q_NHD[new]))
            begin += count
        return torch.cat(mixed)


def _store(past: SequenceKV, slot: int, k_SKD: Tensor, v_SKD: Tensor | None) -> None:
    """Write the new keys and values [S, K, D] after the last token of the sequence `past`, in one slot."""
    keys_TKD, values_TKD = past.kept[slot]
    end = past.length + len(k_SKD)
    keys_TKD[past.length : end] = k_SKD
    if values_TKD is not None:
        values_TKD[past.length : end] = v_SKD


def _attend(past: SequenceKV, layer: Layer, q_SHD: Tensor) -> Tensor:
    """Return the causal attention of one sequence's new tokens to all of its tokens, [S, H, D]."""
    keys_TKD, values_TKD = past.kept[layer.slot]
    end = past.length + len(q_SHD)
    k_TKD = keys_TKD[:end]
    v_TKD = k_TKD[..., : past.latent.kv_rank] if values_TKD is None else values_TKD[:end]
    q_1HSD, k_1KTD, v_1KTD = (x_TKD.transpose(0, 1).unsqueeze(0) for x_TKD in (q_SHD, k_TKD, v_TKD))
    return causal_attention(layer, q_1HSD, k_1KTD, v_1KTD)[0].transpose(0, 1)
