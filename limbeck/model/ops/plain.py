"""The operations of a decoder in torch, on any device and in any dtype.

N tokens · B rows · C hidden size · O outputs · H heads · K key/value heads · D head size · V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..context import Layer

BLOCK = 64  # tokens of a block of keys and values
Rope = tuple[Tensor, Tensor]  # cos and sin of each token, [N, 1, D] both; see `decoder.rope_table`


class PlainOps:
    """The operations in torch: the reference for every other table."""

    exact = False  # whether sampler and learner agree to the last bit in 16 bits too

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight over the last dimension of x [..., C]; weight is [C]."""
        return Normalize.apply(x, weight, eps)

    def add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm, both [N, C]."""
        x = x + delta
        return x, self.norm(x, weight, eps)

    def rotate(self, x_NHD: Tensor, rope: Rope) -> Tensor:
        """Return the heads [N, H, D] rotated, in the half-split layout: `x * cos + x.roll(D / 2) * sin`."""
        cos_N1D, sin_N1D = rope
        rolled_NHD = x_NHD.roll(x_NHD.shape[-1] // 2, -1)
        return torch.addcmul(x_NHD * cos_N1D, rolled_NHD, sin_N1D).to(x_NHD.dtype)

    def swiglu(self, both_NI: Tensor) -> Tensor:
        """Return silu(gate) * up [N, I], where gate and up are the two halves of the last dimension."""
        gate_NI, up_NI = both_NI.chunk(2, dim=-1)
        return F.silu(gate_NI) * up_NI

    def linear(self, x_NC: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias [N, O]."""
        return F.linear(x_NC, weight_OC, bias_O)

    def logits(self, x_NC: Tensor, head_VC: Tensor) -> Tensor:
        """Return the logits x @ head.T [N, V] without a gradient, in float32 or better."""
        precision = torch.promote_types(x_NC.dtype, torch.float32)
        return F.linear(x_NC.to(precision), head_VC.to(precision))

    logits_at_once = 0  # logits in memory at once, if the table computes log-probabilities itself

    def attend(
        self, layer: Layer, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, plan: object
    ) -> Tensor | None:
        """Return attention over packed sequences [N, H, D], or None if the table leaves it to the context."""
        return None

    # ------------------------------------------------------------ keys and values in blocks

    def store(self, k_NKD: Tensor, v_NKD: Tensor, slots_N: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values of new tokens to the places `slots_N` of a pool [tokens, K, D]."""
        keys.index_copy_(0, slots_N, k_NKD)
        values.index_copy_(0, slots_N, v_NKD)

    def attend_one(
        self, layer: Layer, q_BHD: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor
    ) -> Tensor:
        """Return the attention of one query a row, its last token, to the row's keys, [B, H, D]."""
        places = torch.arange(table.shape[1] * BLOCK, device=table.device)
        tokens_BT = table.long().gather(1, (places // BLOCK).expand(len(table), -1)) + places % BLOCK
        hidden_BT = places >= lengths.unsqueeze(1)
        if layer.window:
            hidden_BT = hidden_BT | (places < lengths.unsqueeze(1) - layer.window)
        k_BTKD = keys[tokens_BT]
        v_BTKD = values[tokens_BT]
        q_BKGD = q_BHD.unflatten(1, (k_BTKD.shape[2], -1))
        scores_BKGT = torch.einsum("bkgd,btkd->bkgt", q_BKGD, k_BTKD) * layer.scale
        weights_BKGT = scores_BKGT.masked_fill(hidden_BT[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("bkgt,btkd->bkgd", weights_BKGT, v_BTKD).flatten(1, 2)

    def attend_rows(
        self,
        layer: Layer,
        q_NHD: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        starts: Tensor,
        lengths: Tensor,
        longest: int,
    ) -> Tensor:
        """Return the attention of new tokens to the keys of their rows, [N, H, D]; see `PagedCache.lay`."""
        counts_B = starts.diff().long()
        rows_N = torch.arange(len(table), device=table.device).repeat_interleave(counts_B)
        places_N = torch.arange(len(q_NHD), device=table.device) - starts[:-1].long()[rows_N]
        seen_N = lengths.long()[rows_N] - counts_B[rows_N] + places_N + 1
        return self.attend_one(layer, q_NHD, keys, values, table[rows_N], seen_N)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return a token for each row and its log-probability, both [B]; temperature 0 takes the likeliest."""
        logprobs_BV = torch.log_softmax(logits_BV / (temperature or 1.0), -1)
        if temperature:
            rising_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
            threshold_B1 = uniform_B.unsqueeze(1) * rising_BV[:, -1:]
            tokens_B = torch.searchsorted(rising_BV, threshold_B1, right=True).squeeze(1)
            tokens_B = tokens_B.clamp(max=logits_BV.shape[1] - 1)
        else:
            tokens_B = logits_BV.argmax(-1)
        return tokens_B, logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)


class Normalize(torch.autograd.Function):
    """RMSNorm that reads and writes memory half as often as torch's own on a CPU, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        """Return x [..., C] normalised over its last dimension and multiplied by weight [C]."""
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients with respect to x [..., C] and to the weight [C]."""
        unit, scale, weight = ctx.saved_tensors
        by_unit = grad * unit
        along = (by_unit @ weight).unsqueeze(-1) / unit.shape[-1]
        grad_x = torch.addcmul(grad * weight, unit, along, value=-1).mul_(scale)
        return grad_x, by_unit.flatten(0, -2).sum(0), None
