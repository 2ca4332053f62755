"""Chunked prefill: the cached keys and values of one sequence, and the attention of its next tokens over
them.

N tokens · T positions · H heads · K key/value heads · D head size · S new tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import ModelConfig
from .context import Layer, RouterTrace
from .kv_cache import KVCache
from .packed import causal_attention


class SequenceKV:
    """The cached keys [T, K, D] and values [T, K, D] of one sequence, slot by slot; of MLA the latents alone.

    It grows by chunks (`ChunkedPrefill`). Rows of a `KVCache` start as copies of it (`fork`), and so may
    another sequence with the same first tokens (`copy_prefix`). `room` is the number of tokens that it can hold.
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
        """The length of the one sequence, as `KVCache.fork` reads it."""
        return [self.length]

    @property
    def entries(self) -> list[tuple[Tensor, Tensor | None]]:
        """Keys and values of the tokens so far, slot by slot, as `KVCache.fork` reads them."""
        filled = []
        for k_TKD, v_TKD in self.kept:
            values = None if v_TKD is None else v_TKD[: self.length]
            filled.append((k_TKD[: self.length], values))
        return filled

    @property
    def bytes(self) -> int:
        """Memory of the whole room."""
        tensors = [tensor for pair in self.kept for tensor in pair if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @classmethod
    def of(cls, cache: KVCache, row: int, length: int) -> SequenceKV:
        """A copy of the first `length` tokens of a row of `cache`."""
        past = cls(cache.config, length, cache.dtype)
        past.length = length
        for slot, (k_TKD, v_TKD) in enumerate(past.kept):
            blocks_KnDP = cache.k_LBKnDP[slot, row]
            k_TKD.copy_(blocks_KnDP.permute(1, 3, 0, 2).flatten(0, 1)[:length])
            if v_TKD is not None:
                v_TKD.copy_(cache.v_LBKTD[slot, row, :, :length].transpose(0, 1))
        return past

    def copy_prefix(self, other: SequenceKV, length: int) -> None:
        """Copy the first `length` tokens of another sequence."""
        self.length = length
        for mine, theirs in zip(self.kept, other.kept, strict=True):
            for target_TKD, source_TKD in zip(mine, theirs, strict=True):
                if target_TKD is not None:
                    target_TKD[:length] = source_TKD[:length]


class ChunkedPrefill:
    """The context of the next tokens of several sequences, laid end to end.

    Each token sees its own sequence's past. `counts[i]` tokens continue the i-th sequence. After the forward
    pass, `settle` makes them part of it.
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
        latent: Tensor | None = None,
    ) -> Tensor:
        """Store new keys and values; attention of new tokens over their own sequence, [N, H, D]."""
        mixed = []
        begin = 0
        for past, count in zip(self.sequences_kv, self.counts, strict=True):
            new = slice(begin, begin + count)
            if k_NKD is not None:
                _store(past, layer.slot, k_NKD[new], None if v_NKD is None else v_NKD[new])
            mixed.append(_attend(past, layer, q_NHD[new]))
            begin += count
        return torch.cat(mixed)

    def settle(self) -> None:
        """Add the new tokens to their sequences; call once they have passed every layer."""
        for past, count in zip(self.sequences_kv, self.counts, strict=True):
            past.length += count


def _store(past: SequenceKV, slot: int, k_SKD: Tensor, v_SKD: Tensor | None) -> None:
    """Write new keys and values behind a sequence's last token."""
    keys_TKD, values_TKD = past.kept[slot]
    end = past.length + len(k_SKD)
    keys_TKD[past.length : end] = k_SKD
    if values_TKD is not None:
        values_TKD[past.length : end] = v_SKD


def _attend(past: SequenceKV, layer: Layer, q_SHD: Tensor) -> Tensor:
    """Attention of a sequence's new tokens, [S, H, D]."""
    keys_TKD, values_TKD = past.kept[layer.slot]
    end = past.length + len(q_SHD)
    k_TKD = keys_TKD[:end]
    v_TKD = k_TKD[..., : past.latent.kv_rank] if values_TKD is None else values_TKD[:end]
    q_1HSD, k_1KTD, v_1KTD = (x_TKD.transpose(0, 1).unsqueeze(0) for x_TKD in (q_SHD, k_TKD, v_TKD))
    return causal_attention(layer, q_1HSD, k_1KTD, v_1KTD)[0].transpose(0, 1)
