"""The operations of a decoder on an NVIDIA card, in Triton: results that do not depend on the batch.

Sampler and learner run the same forward kernels, so a token's log-probability has the same bits in both.
Backward passes need to be deterministic only, and leave products to cuBLAS and attention to torch's flash
kernel. N tokens · C hidden size · O outputs · H heads · K key/value heads · D head size · V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cuda import attention, products, rowwise, sampling
from .plain import PlainOps, Rope

if TYPE_CHECKING:
    from ..context import Layer
    from ..paged import AttentionPlan


class CUDAOps(PlainOps):
    """The operations on an NVIDIA card."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return RMSNorm of x [..., C]."""
        return _Norm.apply(x, weight, eps)

    def add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm, both [N, C]."""
        return _AddNorm.apply(x, delta, weight, eps)

    def rotate(self, x_NHD: Tensor, rope: Rope) -> Tensor:
        """Return the rotated heads [N, H, D]."""
        return _Rotate.apply(x_NHD, *rope)

    def swiglu(self, both_NI: Tensor) -> Tensor:
        """Return silu(gate) * up [N, I]."""
        return _SwiGLU.apply(both_NI)

    def linear(self, x_NC: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias [N, O]."""
        return _Linear.apply(x_NC, weight_OC, bias_O)

    def logits(self, x_NC: Tensor, head_VC: Tensor) -> Tensor:
        """Return the logits [N, V] without a gradient, in float32."""
        return products.linear(x_NC, head_VC, dtype=torch.float32)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return a token for each row and its log-probability, both [B]."""
        return sampling.draw(logits_BV, uniform_B, temperature)

    logits_at_once = 1 << 28  # 1 GiB in float32

    def score(
        self, hidden_RC: Tensor, head_VC: Tensor, targets_R: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits of a chunk [R, V], and the targets' log-probabilities with the bits of `draw`."""
        logits_RV = self.logits(hidden_RC, head_VC)
        logprob_R = None if targets_R is None else sampling.logprob(logits_RV, targets_R, temperature)
        if temperature != 1.0:
            logits_RV /= temperature
        return logits_RV, logprob_R

    def attend(self, layer: Layer, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, plan: AttentionPlan) -> Tensor:
        """Return causal attention over the sequences of a plan, [N, H, D]."""
        return _Attend.apply(q_NHD, k_NKD, v_NKD, plan, layer.scale, layer.window)

    def store(self, k_NKD: Tensor, v_NKD: Tensor, slots_N: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values of new tokens to the places `slots_N` of a pool [tokens, K, D]."""
        rowwise.store(k_NKD, v_NKD, slots_N, keys, values)

    def attend_one(
        self, layer: Layer, q_BHD: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor
    ) -> Tensor:
        """Return the attention of one query a row, its last token, to the row's keys, [B, H, D]."""
        return attention.attend_one(
            q_BHD.contiguous(), keys, values, table, lengths, layer.scale, layer.window
        )

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
        """Return the attention of new tokens to the keys of their rows, [N, H, D]."""
        out, _ = attention.attend(
            q_NHD.contiguous(), keys, values, table, starts, lengths, layer.scale, longest, layer.window
        )
        return out


class _Norm(torch.autograd.Function):
    """RMSNorm."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        """Return the norm of x [..., C]."""
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rowwise.norm(x, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients by x [..., C] and the weight [C]."""
        return *_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


class _AddNorm(torch.autograd.Function):
    """A sum and its RMSNorm."""

    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        """Return x + delta and its norm, both [N, C]."""
        y, total = rowwise.norm(delta.contiguous(), weight, eps, x.contiguous())
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, y

    @staticmethod
    def backward(ctx, grad_total, grad):
        """Return the gradients by x and delta [N, C], which are the same, and by the weight [C]."""
        by_x, by_weight = _norm_backward(grad, *ctx.saved_tensors, ctx.eps)
        by_x = by_x + grad_total
        return by_x, by_x, by_weight, None


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of RMSNorm by x [..., C] and the weight [C]."""
    x32 = x.float()
    scale = (x32.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = x32 * scale
    weighted = grad.float() * weight.float()
    along = (weighted * unit).mean(-1, keepdim=True)
    by_x = (weighted - unit * along) * scale
    by_weight = (grad.float() * unit).flatten(0, -2).sum(0)
    return by_x.to(x.dtype), by_weight.to(weight.dtype)


class _Rotate(torch.autograd.Function):
    """Rotation of heads by the angles of their positions."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        """Return the rotated heads [N, H, D]."""
        ctx.save_for_backward(cos, sin)
        return rowwise.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient by x [N, H, D]: a rotation in the opposite direction."""
        cos, sin = ctx.saved_tensors
        return rowwise.rotate(grad.contiguous(), cos, -sin), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx, both):
        """Return silu(gate) * up [N, I]."""
        ctx.save_for_backward(both)
        return rowwise.swiglu(both)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient by both halves [N, 2 I]."""
        (both,) = ctx.saved_tensors
        return rowwise.swiglu_backward(grad.contiguous(), both)


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """Return x @ weight.T + bias [N, O]."""
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients by x [N, C], weight [O, C] and bias [O]."""
        x, weight = ctx.saved_tensors
        by_bias = grad.float().sum(0).to(grad.dtype) if ctx.biased else None
        return grad @ weight, grad.T @ x, by_bias


class _Attend(torch.autograd.Function):
    """Causal attention over the sequences of a plan."""

    @staticmethod
    def forward(ctx, q, k, v, plan, scale, window):
        """Return the mixed values [N, H, D]."""
        q = q.contiguous()
        keys, values = plan.keys(k), plan.keys(v)
        out, lse = attention.attend(
            q, keys, values, plan.table, plan.starts, plan.lengths, scale, plan.longest_query, window
        )
        ctx.save_for_backward(q, keys, values, out, lse)
        ctx.settings = plan, scale, window, len(k)
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients by q [N, H, D], and by k and v [N, K, D]."""
        q, keys, values, out, lse = ctx.saved_tensors
        plan, scale, window, tokens = ctx.settings
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        by_q, by_keys, by_values = torch.ops.aten._flash_attention_backward(
            grad.contiguous(),
            q,
            keys,
            values,
            out,
            lse.T.contiguous(),
            plan.starts,
            plan.key_starts,
            plan.longest_query,
            plan.longest_key,
            0.0,
            True,
            seed,
            seed,
            scale=scale,
            window_size_left=window - 1 if window else -1,
            window_size_right=0,
        )
        return by_q, plan.gather_gradient(by_keys, tokens), plan.gather_gradient(by_values, tokens), None, None, None
