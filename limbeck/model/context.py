"""What a decoder's layers need to know of the sequences: attention contexts and router traces.

A context says which sequences the tokens of a forward pass belong to and computes the attention among them. A
router trace records which experts were chosen. N tokens · H heads · K key/value heads, or chosen experts of a
token · D head size · R latent rank · E experts · S sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .kernels import Trees
    from .ops import Ops
    from .ops.table import Latents
    from .paged import AttentionPlan


class Layer(NamedTuple):
    """The properties of one attention layer that a context needs.

    `slot` is the index of the layer's keys and values in a cache, `scale` the factor of its attention scores,
    and `window` the number of positions that a token sees, its own included (0: all). `lends` is True if
    later layers may use its keys and values.
    """

    slot: int
    scale: float
    window: int
    lends: bool = False


class Context(Protocol):
    """The sequences that the tokens of a forward pass belong to, and the attention among them.

    `positions` [N] are the tokens' positions in their sequences. `routes`, if it is not None, records the
    routers' choices of experts or makes them repeat given ones. If `absorbed` is True, layers of multi-head
    latent attention pass latents as keys and get mixed latents back; otherwise they pass full keys and
    values. `ops` are the operations of the model that runs the tokens, which sets them.
    """

    positions: Tensor
    absorbed: bool
    routes: RouterTrace | None
    ops: Ops

    def attend(
        self, layer: Layer, q: Tensor, k: Tensor | None, v: Tensor | None, latents: Latents | None = None
    ) -> Tensor:
        """Return the attention of queries [N, H, D] to keys and values [N, K, D]: mixed values [N, H, D].

        A layer that uses an earlier layer's keys and values passes None for both. `latents` are what MLA made
        them of.
        """
        ...


class Sequences(Protocol):
    """Whole sequences that are packed together, laid out for each table of operations.

    `longest` is the number of tokens of the longest sequence. The compiled kernels take `trees`, and `kernel`
    is the name of the one that computes them; the kernels of a card take `plan`; torch takes padded runs
    (`attend_padded`). `kept`, if it is not None, keeps the results of one layer's attention from a forward
    pass until the layer is computed a second time. `lent` are the keys and values of the latest layer that
    lends them to later ones.
    """

    longest: int
    kernel: str
    trees: Trees
    plan: AttentionPlan
    kept: list[tuple[Tensor, Tensor]] | None
    lent: tuple[Tensor, Tensor] | None

    def attend_padded(self, layer: Layer, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Return causal attention within each sequence, [N, H, D], by torch."""
        ...


class RouterTrace:
    """The experts that a forward pass chose, layer by layer, or has to choose again (router replay).

    `given` [N, layers with experts, K] are the choices to repeat; with None the routers choose. `balance` is
    the weight of the sequence-wise balance loss (0: none), and `sequences_N` the index of each token's
    sequence, which this loss needs. Each layer with experts appends to four lists: `chosen` its choices [N,
    K], `loads` the number of tokens of each expert [E], `entropies` the entropy of its router, summed over
    tokens, and, if `balance` is set, `penalties` its balance loss. With `choices_only` it appends to the
    first alone, without a wait for the device.
    """

    def __init__(
        self,
        given: Tensor | None = None,
        balance: float = 0.0,
        sequences_N: Tensor | None = None,
        choices_only: bool = False,
    ):
        self.given = given
        self.choices_only = choices_only
        self.balance = balance
        self.sequences_N = sequences_N
        self.chosen: list[Tensor] = []
        self.loads: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self.penalties: list[Tensor] = []

    def replay(self, layer: int) -> RouterTrace:
        """Return a trace that makes one layer with experts repeat its choices, for a second computation.

        `layer` counts the layers with experts, from 0. What the trace records is not needed.
        """
        given_NLK = torch.stack(self.chosen[layer : layer + 1], 1)
        return RouterTrace(given_NLK, self.balance, self.sequences_N)

    def note(self, scores_NE: Tensor, chosen_NK: Tensor) -> None:
        """Record the scores and choices of one layer; every layer with experts calls this once, in order."""
        self.chosen.append(chosen_NK)
        if self.choices_only:
            return
        self.loads.append(torch.bincount(chosen_NK.flatten(), minlength=scores_NE.shape[1]))
        share_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        self.entropies.append(torch.special.entr(share_NE.detach()).sum())
        if self.balance:
            penalty = self.balance * sequence_balance(share_NE, chosen_NK, self.sequences_N)
            self.penalties.append(penalty)


def sequence_balance(share_NE: Tensor, chosen_NK: Tensor, sequences_N: Tensor) -> Tensor:
    """Return DeepSeek-V3's sequence-wise balance loss (arXiv 2412.19437, eq. 17-20), summed over sequences.

    `share_NE` are the router's scores, normalised to a sum of 1 per token. Each sequence adds the sum over
    experts of the relative frequency with which it chose the expert, times the expert's mean share; this is 1
    for a sequence that uses its experts evenly.
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
