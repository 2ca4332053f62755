"""The operations of a decoder in torch, on any device and in any dtype.

N tokens · B rows · C hidden size · O outputs · H heads · K key/value heads · G query heads of a key head · D
head size · O outputs · T positions · S new tokens of a row · R predictions, or latent rank · V vocabulary · E
experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import experts, scoring
from .table import BLOCK, Latents, Pool, Predictions, Rope, Rows

if TYPE_CHECKING:
    from ..context import Layer, Sequences

HALF = (torch.bfloat16, torch.float16)


class PlainOps:
    """The operations in torch: the reference for every other table. Methods are described in `Ops`."""

    on_host = False
    logits_at_once = 0
    prefill_tokens = 1 << 13
    precise = torch.float64  # of cumulative sums of probabilities

    exact = False  # whether sampler and learner agree to the last bit in 16 bits too

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return RMSNorm of x [..., C], computed in float32 or better."""
        if x.dtype in HALF:
            return Normalize.apply(x.float(), weight.float(), eps).to(x.dtype)
        return Normalize.apply(x, weight, eps)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm, both [N, C]; without `delta`, x and its norm."""
        if delta is not None:
            x = x + delta
        return x, self.norm(x, weight, eps)

    def rotate(self, x_NHD: Tensor, rope: Rope) -> Tensor:
        """Return the rotated heads [N, H, D]."""
        cos_N1D, sin_N1D = rope
        rolled_NHD = x_NHD.roll(x_NHD.shape[-1] // 2, -1)
        return torch.addcmul(x_NHD * cos_N1D, rolled_NHD, sin_N1D).to(x_NHD.dtype)

    def swiglu(self, both_NI: Tensor) -> Tensor:
        """Return silu(gate) * up [N, I]."""
        gate_NI, up_NI = both_NI.chunk(2, dim=-1)
        return F.silu(gate_NI) * up_NI

    def geglu(self, both_NI: Tensor) -> Tensor:
        """Return gelu(gate) * up [N, I]."""
        gate_NI, up_NI = both_NI.chunk(2, dim=-1)
        return F.gelu(gate_NI, approximate="tanh") * up_NI

    def linear(self, x_NC: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias [N, O]."""
        return F.linear(x_NC, weight_OC, bias_O)

    def logits(self, x_NC: Tensor, head_VC: Tensor) -> Tensor:
        """Return the logits [N, V] without a gradient, in float32 or better."""
        return self.router(x_NC, head_VC)

    def router(self, x_NC: Tensor, weight_EC: Tensor) -> Tensor:
        """Return the logits of a router [N, E], in float32 or better."""
        precision = torch.promote_types(x_NC.dtype, torch.float32)
        return F.linear(x_NC.to(precision), weight_EC.to(precision))

    def top_k(self, scores_NE: Tensor, k: int) -> Tensor:
        """Return the indices of the k highest scores of each row [N, K], the highest first."""
        return scores_NE.topk(k).indices

    def row_sums(self, x_NK: Tensor) -> Tensor:
        """Return the sum of each row, [N, 1]."""
        return x_NK.sum(-1, keepdim=True)

    def mix_experts(
        self,
        x_NC: Tensor,
        gate_up_EIC: Tensor,
        down_ECI: Tensor,
        chosen_NK: Tensor,
        weights_NK: Tensor,
        rounding: experts.Rounding = experts.EXACT,
    ) -> Tensor:
        """Return the sum over each token's experts of weight x SwiGLU(x), [N, C]."""
        order_M, ends_E = experts.sort_choices(chosen_NK, len(down_ECI))
        ends_E = ends_E.to(torch.int32)
        return experts.Mixed.apply(x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E, rounding)

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        sequences: Sequences,
        latents: Latents | None = None,
    ) -> Tensor:
        """Return causal attention within whole sequences, [N, H, D]."""
        return sequences.attend_padded(layer, q_NHD, k_NKD, v_NKD)

    def per_head(self, x_NHD: Tensor, weight_HOD: Tensor) -> Tensor:
        """Return each head's product with its own weight, [N, H, O]."""
        return torch.einsum("nhd,hod->nho", x_NHD, weight_HOD)

    def absorb(self, q_nope_NHD: Tensor, q_rope_NHD: Tensor, up_key_HDR: Tensor) -> Tensor:
        """Return queries of cached latents and rotated keys, [N, H, R + D]."""
        return torch.cat([self.per_head(q_nope_NHD, up_key_HDR.mT), q_rope_NHD], dim=-1)

    # ------------------------------------------------------------ keys and values in blocks

    def store(self, k_NKD: Tensor, v_NKD: Tensor | None, slots_N: Tensor, pool: Pool) -> None:
        """Write the keys and values of new tokens to the places `slots_N` of a pool."""
        keys, values = pool
        keys.index_copy_(0, slots_N, k_NKD)
        if v_NKD is not None:
            values.index_copy_(0, slots_N, v_NKD)

    def attend_one(self, layer: Layer, q_BHD: Tensor, pool: Pool, table: Tensor, lengths: Tensor) -> Tensor:
        """Return the attention of one query a row to the row's keys, [B, H, D]."""
        places_T = torch.arange(table.shape[1] * BLOCK, device=table.device)
        tokens_BT = table.long().gather(1, (places_T // BLOCK).expand(len(table), -1)) + places_T % BLOCK
        hidden_BT = places_T >= lengths.unsqueeze(1)
        if layer.window:
            hidden_BT = hidden_BT | (places_T < lengths.unsqueeze(1) - layer.window)
        k_BTKD, v_BTKD = (entries[tokens_BT] for entries in pool)
        q_BKGD = q_BHD.unflatten(1, (k_BTKD.shape[2], -1))
        scores_BKGT = torch.einsum("bkgd,btkd->bkgt", q_BKGD, k_BTKD) * layer.scale
        weights_BKGT = scores_BKGT.masked_fill(hidden_BT[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("bkgt,btkd->bkgd", weights_BKGT, v_BTKD).flatten(1, 2)

    def attend_rows(self, layer: Layer, q_NHD: Tensor, pool: Pool, rows: Rows) -> Tensor:
        """Return the attention of new tokens to the keys of their rows, [N, H, D]; waits for the host."""
        mixed = []
        places_P = torch.arange(BLOCK, device=q_NHD.device)
        parts = q_NHD.split(rows.starts.diff().tolist())
        for q_SHD, blocks, length in zip(parts, rows.table, rows.lengths.tolist(), strict=True):
            tokens_T = (blocks.long().unsqueeze(1) + places_P).flatten()[:length]
            k_1KTD, v_1KTD = (entries[tokens_T].transpose(0, 1).unsqueeze(0) for entries in pool)
            q_1HSD = q_SHD.transpose(0, 1).unsqueeze(0)
            mixed.append(causal_attention(layer, q_1HSD, k_1KTD, v_1KTD)[0].transpose(0, 1))
        return torch.cat(mixed)

    # ------------------------------------------------------------ next tokens

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return a token for each row and its log-probability, both [B]."""
        if temperature not in (0, 1):
            logits_BV = logits_BV / temperature
        logprobs_BV = torch.log_softmax(logits_BV, -1)
        if temperature:
            tokens_B = sample_inverse_cdf(logprobs_BV.exp(), uniform_B, self.precise)
        else:
            tokens_B = logits_BV.argmax(-1)
        return tokens_B, logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)

    def logprob(self, logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities of given tokens [B]."""
        if temperature not in (0, 1):
            logits_BV = logits_BV / temperature
        return torch.log_softmax(logits_BV, -1).gather(1, tokens_B.unsqueeze(1)).squeeze(1)

    def cumulate(self, values_BV: Tensor) -> Tensor:
        """Return the cumulative sums of each row, [B, V]."""
        return values_BV.cumsum(-1)

    def ids_at_once(self, vocabulary: int) -> int:
        """Return for how many ids `score` has logits in memory at once."""
        return scoring.SPAN if vocabulary > scoring.WIDE else vocabulary

    def score(self, predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-probabilities of the targets, the entropies, and what `score_backward` needs."""
        if len(predictions.head_VC) > scoring.WIDE:
            return scoring.score_in_spans(predictions)
        return scoring.score(predictions)

    def score_backward(
        self, predictions: Predictions, grad_R: Tensor, needed_R: Tensor, by_head_VC: Tensor | None
    ) -> Tensor:
        """Return the gradient by the hidden states [R, C], and add that by the head to `by_head_VC`."""
        if len(predictions.head_VC) > scoring.WIDE:
            return scoring.score_in_spans_backward(predictions, grad_R, needed_R, by_head_VC)
        return scoring.score_backward(predictions, grad_R, by_head_VC)

    # ------------------------------------------------------------ the device

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return the step itself."""
        return step

    def send(self, x: Tensor, device: torch.device) -> Tensor:
        """Return a tensor of any shape on the device."""
        return x.to(device)

    def fetch(self, x: Tensor) -> Callable[[], Tensor]:
        """Return a function that returns a copy of a tensor of any shape on the host, as it is now."""
        copy = x.to("cpu", copy=True)
        return lambda: copy

    def free_bytes(self, device: torch.device) -> int | None:
        """Return None: torch has no word for it that all devices know."""
        return None


class MPSOps(PlainOps):
    """The operations on Apple's GPUs, which have no float64."""

    precise = torch.float32


def sample_inverse_cdf(probabilities_BV: Tensor, uniform_B: Tensor, precise: torch.dtype) -> Tensor:
    """Return for each row the first token [B] at which the cumulative sum of the probabilities exceeds the
    uniform number times their total. Sums are in the dtype `precise`."""
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=precise)
    threshold_B1 = uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    tokens_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
    return tokens_B.clamp_(max=probabilities_BV.shape[1] - 1)


def causal_attention(layer: Layer, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Return causal attention of the last S positions to all T positions, [B, H, S, D].

    There may be more query heads than key heads (grouped-query attention).
    """
    width = q_BHSD.shape[2]
    seen = k_BKTD.shape[2]
    mask_ST = None
    if seen > width or 0 < layer.window < seen:
        mask_ST = torch.ones(width, seen, dtype=torch.bool, device=q_BHSD.device).tril(seen - width)
        if layer.window:
            mask_ST = mask_ST.triu(seen - width - layer.window + 1)
    return F.scaled_dot_product_attention(
        q_BHSD,
        k_BKTD,
        v_BKTD,
        attn_mask=mask_ST,
        is_causal=mask_ST is None,
        scale=layer.scale,
        enable_gqa=q_BHSD.shape[1] != k_BKTD.shape[1],
    )


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
