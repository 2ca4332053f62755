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

    exact = True

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

    logits_at_once = 1 << 26  # 256 MiB in float32

    def score(
        self, hidden_RC: Tensor, head_VC: Tensor, targets_R: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the targets' log-probabilities, with the bits of `draw`, the entropies, and what
        `score_backward` needs, all [R]."""
        return sampling.score(self.logits(hidden_RC, head_VC), targets_R, temperature)

    def score_backward(
        self,
        grad_R: Tensor,
        hidden_RC: Tensor,
        head_VC: Tensor,
        targets_R: Tensor,
        logsum_R: Tensor,
        temperature: float,
        by_hidden_RC: Tensor,
        by_head_VC: Tensor,
    ) -> None:
        """Write the gradient by the hidden states, and add the gradient by the head to `by_head_VC`."""
        logits_RV = self.logits(hidden_RC, head_VC)
        grad_RV = sampling.score_backward(logits_RV, targets_R, grad_R, logsum_R, temperature, head_VC.dtype)
        torch.mm(grad_RV, head_VC, out=by_hidden_RC)
        by_head_VC.add_(torch.mm(grad_RV.T, hidden_RC, out_dtype=torch.float32))

    def attend(self, layer: Layer, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, plan: AttentionPlan) -> Tensor:
        """Return causal attention over the sequences of a plan, [N, H, D]."""
        return _Attend.apply(q_NHD, k_NKD, v_NKD, plan, layer, self._attention)

    def _attention(
        self, layer: Layer, q_NHD: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """Return the mixed values [N, H, D] and the logs of the sums of exponentials [N, H]."""
        return attention.attend(
            q_NHD, keys, values, plan.table, plan.starts, plan.lengths, layer.scale, plan.longest_query, layer.window
        )

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


class FastCUDAOps(CUDAOps):
    """The operations on an NVIDIA card with the libraries' products and attention in the learner.

    Their order of summation depends on the batch, so sampler and learner agree only within rounding.
    """

    exact = False

    def linear(self, x_NC: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias [N, O]."""
        return torch.nn.functional.linear(x_NC, weight_OC, bias_O)

    def logits(self, x_NC: Tensor, head_VC: Tensor) -> Tensor:
        """Return the logits [N, V] without a gradient, in float32."""
        return torch.mm(x_NC, head_VC.T, out_dtype=torch.float32)

    def _attention(
        self, layer: Layer, q_NHD: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """Return the mixed values [N, H, D] and the logs of the sums of exponentials [N, H]."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q_NHD,
            keys,
            values,
            plan.starts,
            plan.key_starts,
            plan.longest_query,
            plan.longest_key,
            0.0,
            True,
            False,
            scale=layer.scale,
            window_size_left=layer.window - 1 if layer.window else -1,
            window_size_right=0,
        )
        return out, lse.T


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
        return *rowwise.norm_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None


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
        by_x, by_weight = rowwise.norm_backward(
            grad.contiguous(), *ctx.saved_tensors, ctx.eps, grad_total.contiguous()
        )
        return by_x, by_x, by_weight, None


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
    def forward(ctx, q, k, v, plan, layer, attend):
        """Return the mixed values [N, H, D]."""
        q = q.contiguous()
        keys, values = plan.keys(k), plan.keys(v)
        kept = plan.results.pop(layer.slot, None) if plan.results is not None else None
        out, lse = kept or attend(layer, q, keys, values, plan)
        if plan.results is not None and kept is None:
            plan.results[layer.slot] = out, lse
        ctx.save_for_backward(q, keys, values, out, lse)
        ctx.settings = plan, layer, len(k)
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients by q [N, H, D], and by k and v [N, K, D]."""
        q, keys, values, out, lse = ctx.saved_tensors
        plan, layer, tokens = ctx.settings
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
            scale=layer.scale,
            window_size_left=layer.window - 1 if layer.window else -1,
            window_size_right=0,
        )
        by_k, by_v = (plan.gather_gradient(by, tokens) for by in (by_keys, by_values))
        return by_q, by_k, by_v, None, None, None
