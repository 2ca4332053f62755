"""Keys and values in blocks of `BLOCK` tokens: the plan of attention, and the cache of a device batch.

A row is one sequence. Block b of a row holds its positions from b x BLOCK on; a table has, for each row and
block, the index of the block's first token in a tensor of keys [tokens, K, D]. N new tokens · B rows · H
heads · K key/value heads · D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .context import Layer, RouterTrace
from .ops import CPU, Ops
from .ops.table import BLOCK, Latents, Rows


class AttentionPlan:
    """Which new tokens attend to which keys: one row for each sequence, causal, aligned at the row's end.

    `queries` are the numbers of new tokens of the rows, `keys` the numbers of their keys, own ones included.
    If `index` is given, the keys of all rows, one after the other, are the tokens with these indices; without
    it they are the new tokens themselves.
    """

    def __init__(
        self,
        queries: Sequence[int],
        keys: Sequence[int],
        index: np.ndarray | None,
        device: torch.device | str,
    ):
        query_starts = np.concatenate([[0], np.cumsum(queries)])
        key_starts = np.concatenate([[0], np.cumsum(keys)])
        self.longest_key = int(max(keys))
        blocks = -(-self.longest_key // BLOCK)
        table = key_starts[:-1, None] + BLOCK * np.arange(blocks)
        self.key_starts = _int32(key_starts, device)
        starts = _int32(query_starts, device)
        lengths = _int32(np.asarray(keys), device)
        self.rows = Rows(_int32(table, device), starts, lengths, int(max(queries)))
        self.index = None if index is None else torch.as_tensor(index, device=device)

    def keys(self, x_NKD: Tensor) -> Tensor:
        """Return the keys or values of all rows, [keys of all rows, K, D]."""
        return x_NKD.contiguous() if self.index is None else x_NKD.index_select(0, self.index)

    def gather_gradient(self, grad: Tensor, tokens: int) -> Tensor:
        """Return the gradient by the new tokens [N, K, D], from one by the keys of all rows, in float32."""
        if self.index is None:
            return grad
        sums = torch.zeros(tokens, *grad.shape[1:], dtype=torch.float32, device=grad.device)
        return sums.index_add_(0, self.index, grad.float()).to(grad.dtype)


class PagedCache:
    """The keys and values of a device batch, in a pool of blocks that never moves.

    `keys` and `values` are [slots, tokens, K, D]; for MLA the keys are latents and the values their first
    part. The last slots are those of so many `modules` of multi-token prediction. Before each forward pass
    `lay` says which tokens come.
    """

    absorbed = True
    ops: Ops = CPU

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        blocks: int,
        modules: int = 0,
    ):
        heads, key, value = config.cache_widths
        pool = (config.slots + modules, blocks * BLOCK, heads)
        self.keys = torch.zeros(*pool, key, dtype=dtype, device=device)
        self.values = torch.zeros(*pool, value, dtype=dtype, device=device)
        if config.latent:
            self.values = self.keys[..., : config.latent.kv_rank]
        self.routes: RouterTrace | None = None

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype, modules: int = 0) -> int:
        """Return the bytes of one block of keys and values of all layers, and of so many MTP modules."""
        heads, key, value = config.cache_widths
        return (config.slots + modules) * BLOCK * heads * (key + value) * dtype.itemsize

    def lay(self, positions: Tensor, slots: Tensor, rows: Rows) -> None:
        """Set the tokens of the next forward pass: their positions [N], and their places in the pool [N]."""
        self.positions = positions
        self.slots = slots
        self.rows = rows

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
        pool = (self.keys[layer.slot], self.values[layer.slot])
        if k_NKD is not None:
            self.ops.store(k_NKD, v_NKD, self.slots, pool)
        rows = self.rows
        if rows.longest == 1:
            return self.ops.attend_one(layer, q_NHD, pool, rows.table, rows.lengths)
        return self.ops.attend_rows(layer, q_NHD, pool, rows)


def _int32(array: np.ndarray, device: torch.device | str) -> Tensor:
    """Return an array of any shape as an int32 tensor on a device."""
    return torch.as_tensor(np.ascontiguousarray(array, dtype=np.int32), device=device)
