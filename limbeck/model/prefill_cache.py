"""What sequences leave behind while they are being read in chunks, and the attention that goes on from it.

N tokens · T positions · H heads · K key/value heads · D head size · S new tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Layer
from .config import ModelConfig
from .ffn import Routes
from .kv_cache import KVCache, mix


class SequenceKV:
    """What one sequence keeps of its tokens, slot by slot: keys [T, K, D] and values, MLA's latents alone. It grows by
    chunks (`ChunkedPrefill`), rows of a `KVCache` begin as copies of it (`fork`), and so may another sequence that begins alike.
    """

    def __init__(self, config: ModelConfig, room: int, dtype: torch.dtype = torch.float32):
        heads, key, value = config.cache_widths
        self.length, self.latent = 0, config.latent
        self.kept = [
            (
                torch.empty(room, heads, key, dtype=dtype),
                torch.empty(room, heads, value, dtype=dtype) if value else None,
            )
            for _ in range(config.slots)
        ]

    @property
    def lengths(self) -> list[int]:
        return [self.length]

    @property
    def entries(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(k[: self.length], None if v is None else v[: self.length]) for k, v in self.kept]

    @property
    def bytes(self) -> int:
        return sum(
            part.numel() * part.element_size() for pair in self.kept for part in pair if part is not None
        )

    @classmethod
    def of(cls, cache: KVCache, row: int, length: int) -> SequenceKV:
        """A copy of the first `length` tokens of a row."""
        past = cls(cache.config, length, cache.dtype)
        past.length = length
        for slot, (k, v) in enumerate(past.kept):
            k.copy_(cache.k_LBKnDP[slot, row].permute(1, 3, 0, 2).flatten(0, 1)[:length])
            if v is not None:
                v.copy_(cache.v_LBKTD[slot, row, :, :length].transpose(0, 1))
        return past

    def begin_as(self, other: SequenceKV, length: int) -> None:
        """Take the first `length` tokens of another sequence over."""
        self.length = length
        for mine, theirs in zip(self.kept, other.kept, strict=True):
            for to, source in zip(mine, theirs, strict=True):
                if to is not None:
                    to[:length] = source[:length]


class ChunkedPrefill:
    """The next tokens of several sequences laid end to end, each seeing its own past and itself: a prefill by chunks."""

    absorbed = True

    def __init__(self, pasts: Sequence[SequenceKV], counts: Sequence[int]):
        self.pasts, self.counts = list(pasts), list(counts)
        self.positions = torch.cat(
            [torch.arange(p.length, p.length + n) for p, n in zip(pasts, counts, strict=True)]
        )
        self.routes: Routes | None = None

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor | None,
        v_NKD: Tensor | None,
        kept: Tensor | None = None,
    ) -> Tensor:
        mixed, begin = [], 0
        for past, count in zip(self.pasts, self.counts, strict=True):
            keys, values = past.kept[layer.slot]
            here, there = slice(begin, begin + count), slice(past.length, past.length + count)
            if k_NKD is not None:
                keys[there] = k_NKD[here]
                if values is not None:
                    values[there] = v_NKD[here]
            k_TKD = keys[: there.stop]
            v_TKD = k_TKD[..., : past.latent.kv_rank] if values is None else values[: there.stop]
            mixed_1HSD = mix(layer, *(x.transpose(0, 1).unsqueeze(0) for x in (q_NHD[here], k_TKD, v_TKD)))
            mixed.append(mixed_1HSD[0].transpose(0, 1))
            begin += count
        return torch.cat(mixed)

    def settle(self) -> None:
        """The tokens have gone through every layer: they are past."""
        for past, count in zip(self.pasts, self.counts, strict=True):
            past.length += count
