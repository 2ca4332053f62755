"""Interfaces between a decoder's layers and the sequences that they run over: attention contexts and router
traces.

N tokens · H heads · K key/value heads, or chosen experts · D head size · R latent rank · E experts · S
sequences.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Layer(NamedTuple):
    """One attention layer, as a context needs it.

    `slot` is the index of its keys and values in a cache, `scale` multiplies its scores, and `window` is the
    number of positions that a token sees, itself included (0: all).
    """

    slot: int
    scale: float
    window: int


class Context(Protocol):
    """The sequences that the tokens of a forward pass belong to, and the attention among them.

    `positions` [N] are the tokens' positions; `routes` records, or replays, the choices of the routers. An
    `absorbed` context attends over MLA's latents as keys and returns mixed latents; others attend over whole
    keys and values.
    """

    positions: Tensor
    absorbed: bool
    routes: RouterTrace | None

    def attend(
        self, layer: Layer, q: Tensor, k: Tensor | None, v: Tensor | None, latent: Tensor | None = None
    ) -> Tensor:
        """Attention of q [N, H, D] over keys [N, K, D] and values [N, K, D]: mixed values [N, H, D].

        A layer that shares an earlier layer's keys and values passes None for both. `latent` [N, 1, R + D] is
        what a cache stores in place of the keys and values of MLA.
        """
        ...


class RouterTrace:
    """The experts that a forward pass chose, layer by layer, or has to choose again (router replay).

    `given` [N, sparse layers, K] are the choices to replay. `balance` is the weight of the sequence-wise
    balance loss, for which `sequences_N` numbers each token's sequence. A forward pass appends, layer by
    layer, the choices [N, K], the tokens of each expert [E], the routers' entropy summed over tokens, and the
    balance loss.
    """

    def __init__(self, given: Tensor | None = None, balance: float = 0.0, sequences_N: Tensor | None = None):
        self.given = given
        self.balance = balance
        self.sequences_N = sequences_N
        self.chosen: list[Tensor] = []
        self.loads: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self.penalties: list[Tensor] = []

    def note(self, scores_NE: Tensor, chosen_NK: Tensor) -> None:
        """Record one layer's choices; every mixture calls this once, in order."""
        self.chosen.append(chosen_NK)
        self.loads.append(torch.bincount(chosen_NK.flatten(), minlength=scores_NE.shape[1]))
        share_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        self.entropies.append(torch.special.entr(share_NE.detach()).sum())
        if self.balance:
            penalty = self.balance * sequence_balance(share_NE, chosen_NK, self.sequences_N)
            self.penalties.append(penalty)


def sequence_balance(share_NE: Tensor, chosen_NK: Tensor, sequences_N: Tensor) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss (arXiv 2412.19437, eq. 17-20), summed over sequences.

    Each sequence adds the sum over experts of f_e P_e, which is 1 for one that uses its experts evenly.
    """
    count = share_NE.shape[1]
    top_k = chosen_NK.shape[1]
    sequences = int(sequences_N.max()) + 1
    lengths_S1 = torch.bincount(sequences_N, minlength=sequences).clamp(min=1).unsqueeze(1)
    pairs_NK = sequences_N.unsqueeze(1) * count + chosen_NK
    used_SE = torch.bincount(pairs_NK.flatten(), minlength=sequences * count).view(sequences, count)
    frequency_SE = used_SE.to(share_NE.dtype) * (count / top_k) / lengths_S1
    mean_SE = torch.zeros_like(frequency_SE).index_add(0, sequences_N, share_NE) / lengths_S1
    return (frequency_SE * mean_SE).sum()
