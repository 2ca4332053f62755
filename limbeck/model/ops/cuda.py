"""The operations of a decoder on an NVIDIA card, in Triton: results that do not depend on the batch.

Sampler and learner run the same forward kernels, so a token's log-probability has the same bits in both.
Backward passes need to be deterministic only, and leave products to cuBLAS and attention to torch: its flash
kernel in 16 bits, its attention over padded sequences in float32. N tokens · C hidden size · O outputs · H
heads · K key/value heads, or experts of a token · D head size · I intermediate size · E experts · M = N x K
choices of experts · V vocabulary · T ids of a part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cuda import attention, products, rowwise, sampling
from ..cuda import experts as grouped
from . import experts
from .plain import HALF, PlainOps
from .scoring import exclude
from .table import Latents, Pool, Predictions, Rope, Rows

if TYPE_CHECKING:
    from ..context import Layer, Sequences
    from ..paged import AttentionPlan

HEAD_NUMBERS = 1 << 24  # numbers of the head's gradient that are computed at once: 64 MiB


class CUDAOps(PlainOps):
    """The operations on an NVIDIA card. Methods are described in `Ops`."""

    logits_at_once = 1 << 26  # 256 MiB in float32
    prefill_tokens = 1 << 15
    exact = True

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return RMSNorm of x [..., C]."""
        return _Norm.apply(x, weight, eps)

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm, both [N, C]; without `delta`, x and its norm."""
        return _AddNorm.apply(x, delta, weight, eps)

    def rotate(self, x_NHD: Tensor, rope: Rope) -> Tensor:
        """Return the rotated heads [N, H, D]."""
        return _Rotate.apply(x_NHD, *rope)

    def swiglu(self, both_NI: Tensor) -> Tensor:
        """Return silu(gate) * up [N, I]."""
        return _SwiGLU.apply(both_NI)

    def linear(self, x_NC: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias [N, O]."""
        return _Linear.apply(x_NC, weight_OC, bias_O, x_NC.dtype)

    def router(self, x_NC: Tensor, weight_EC: Tensor) -> Tensor:
        """Return the logits of a router [N, E], in float32."""
        return _Linear.apply(x_NC, weight_EC, None, torch.float32)

    def top_k(self, scores_NE: Tensor, k: int) -> Tensor:
        """Return the indices of the k highest scores of each row [N, K]; of equal ones the first come first.

        torch's `topk` leaves open which of equal scores it takes. A view would keep all N x E indices.
        """
        return scores_NE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()

    def row_sums(self, x_NK: Tensor) -> Tensor:
        """Return the sum of each row, [N, 1], by a product, whose order of summation is fixed."""
        return _Linear.apply(x_NK, x_NK.new_ones(1, x_NK.shape[1]), None, x_NK.dtype)

    def mix_experts(
        self,
        x_NC: Tensor,
        gate_up_EIC: Tensor,
        down_ECI: Tensor,
        chosen_NK: Tensor,
        weights_NK: Tensor,
        rounding: experts.Rounding = experts.EXACT,
    ) -> Tensor:
        """Return the sum over each token's experts of weight x SwiGLU(x), [N, C].

        Simulated FP8 is for pretraining, which samples nothing: it takes the library's products.
        """
        if rounding is not experts.EXACT:
            return super().mix_experts(x_NC, gate_up_EIC, down_ECI, chosen_NK, weights_NK, rounding)
        order_M, ends_E = experts.sort_choices(chosen_NK, len(down_ECI))
        return _Mixed.apply(
            x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E.to(torch.int32), rounding
        )

    def logits(self, x_NC: Tensor, head_VC: Tensor) -> Tensor:
        """Return the logits [N, V] without a gradient, in float32."""
        return products.linear(x_NC, head_VC, dtype=torch.float32)

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        sequences: Sequences,
        latents: Latents | None = None,
    ) -> Tensor:
        """Return causal attention within whole sequences, [N, H, D].

        With latents the result is that of decoding, which has no other keys and values; those that are
        written out serve the backward pass.
        """
        attend = self._attention if latents is None else partial(self._latent_attention, latents)
        return _Attend.apply(q_NHD, k_NKD, v_NKD, layer, sequences, attend)

    def _attention(
        self, layer: Layer, q_NHD: Tensor, pool: Pool, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """Return the mixed values [N, H, D] and the logs of the sums of exponentials [N, H]."""
        return attention.attend(q_NHD, pool, plan.rows, layer.scale, layer.window)

    def _latent_attention(
        self, latents: Latents, layer: Layer, q_NHD: Tensor, pool: Pool, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """Return the mixed values [N, H, D] and the logs of the sums of exponentials [N, H], from latents."""
        cached_N1D, up_key_HDR, up_value_HDR = latents
        nope = up_key_HDR.shape[1]
        q_NHD = self.absorb(q_NHD[..., :nope], q_NHD[..., nope:], up_key_HDR)
        keys = plan.keys(cached_N1D)
        pool = (keys, keys[..., : up_key_HDR.shape[2]])
        mixed_NHR, lse_NH = attention.attend(q_NHD, pool, plan.rows, layer.scale, layer.window)
        return self.per_head(mixed_NHR, up_value_HDR), lse_NH

    def per_head(self, x_NHD: Tensor, weight_HOD: Tensor) -> Tensor:
        """Return each head's product with its own weight, [N, H, O], without a gradient."""
        return products.per_head(x_NHD, weight_HOD)

    def store(self, k_NKD: Tensor, v_NKD: Tensor | None, slots_N: Tensor, pool: Pool) -> None:
        """Write the keys and values of new tokens to the places `slots_N` of a pool."""
        rowwise.store(k_NKD, v_NKD, slots_N, pool)

    def attend_one(self, layer: Layer, q_BHD: Tensor, pool: Pool, table: Tensor, lengths: Tensor) -> Tensor:
        """Return the attention of one query a row to the row's keys, [B, H, D]."""
        return attention.attend_one(q_BHD.contiguous(), pool, table, lengths, layer.scale, layer.window)

    def attend_rows(self, layer: Layer, q_NHD: Tensor, pool: Pool, rows: Rows) -> Tensor:
        """Return the attention of new tokens to the keys of their rows, [N, H, D]."""
        return attention.attend(q_NHD.contiguous(), pool, rows, layer.scale, layer.window)[0]

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return a token for each row and its log-probability, both [B]."""
        return sampling.draw(logits_BV, uniform_B, temperature)

    def logprob(self, logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities of given tokens [B]."""
        return sampling.logprob(logits_BV, tokens_B, temperature or 1.0)

    def cumulate(self, values_BV: Tensor) -> Tensor:
        """Return the cumulative sums of each row, [B, V], by products, whose order of summation is fixed."""
        return products.cumulate(values_BV)

    def ids_at_once(self, vocabulary: int) -> int:
        """Return the whole vocabulary."""
        return vocabulary

    def score(self, predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities with the bits of `draw`, entropies, and logs of the sums of exponentials,
        all [R]."""
        return sampling.score(self._kept(predictions), predictions.targets_R, predictions.temperature)

    def score_backward(
        self, predictions: Predictions, grad_R: Tensor, needed_R: Tensor, by_head_VC: Tensor | None
    ) -> Tensor:
        """Return the gradient by the hidden states [R, C], and add that by the head to `by_head_VC`."""
        hidden_RC, head_VC, targets_R, temperature, _ = predictions
        by_RV = sampling.score_backward(
            self._kept(predictions), targets_R, grad_R, needed_R, temperature, head_VC.dtype
        )
        if by_head_VC is None:
            return torch.mm(by_RV, head_VC)
        if by_RV.dtype == by_head_VC.dtype:
            by_head_VC.addmm_(by_RV.T, hidden_RC)
        else:
            rows = HEAD_NUMBERS // by_head_VC.shape[1]
            for by_RT, by_head_TC in zip(by_RV.split(rows, 1), by_head_VC.split(rows), strict=True):
                by_head_TC.add_(torch.mm(by_RT.T, hidden_RC, out_dtype=by_head_TC.dtype))
        return torch.mm(by_RV, head_VC)

    def _kept(self, predictions: Predictions) -> Tensor:
        """Return the logits [R, V]; those of ids that sampling excluded are minus infinity."""
        logits_RV = self.logits(predictions.hidden_RC, predictions.head_VC)
        return logits_RV if predictions.kept_RK is None else exclude(logits_RV, predictions.kept_RK)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return the replay of a CUDA graph of the step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compile its kernels
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def send(self, x: Tensor, device: torch.device) -> Tensor:
        """Return a copy of a tensor of any shape on the card; it travels from pinned memory."""
        return x.pin_memory().to(device, non_blocking=True)

    def fetch(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a tensor of any shape to pinned memory of the host; return what waits for it."""
        copy = x.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> Tensor:
            arrived.synchronize()
            return copy

        return wait

    def free_bytes(self, device: torch.device) -> int | None:
        """Return the bytes that the card has free, and those that torch holds for later."""
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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
        if x_NC.dtype == torch.float32:
            return torch.mm(x_NC, head_VC.T)
        return torch.mm(x_NC, head_VC.T, out_dtype=torch.float32)

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        sequences: Sequences,
        latents: Latents | None = None,
    ) -> Tensor:
        """Return causal attention within whole sequences, [N, H, D], from keys and values written out."""
        width = v_NKD.shape[2]
        return super().attend(layer, q_NHD, k_NKD, _widened(v_NKD, k_NKD), sequences)[..., :width]

    def _attention(
        self, layer: Layer, q_NHD: Tensor, pool: Pool, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """Return the mixed values [N, H, D] and the logs of the sums of exponentials [N, H]."""
        if q_NHD.dtype not in HALF:
            return super()._attention(layer, q_NHD, pool, plan)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q_NHD,
            *pool,
            plan.rows.starts,
            plan.key_starts,
            plan.rows.longest,
            plan.longest_key,
            0.0,
            True,
            False,
            **_flash(layer),
        )
        return out, lse.T


def _flash(layer: Layer) -> dict[str, float]:
    """Return what torch's flash attention has to know of a layer."""
    left = layer.window - 1 if layer.window else -1
    return {"scale": layer.scale, "window_size_left": left, "window_size_right": 0}


def _widened(x_NKD: Tensor, other_NKD: Tensor) -> Tensor:
    """Return x with zeros up to the head size of another tensor: torch's flash attention takes one size."""
    missing = other_NKD.shape[2] - x_NKD.shape[2]
    return F.pad(x_NKD, (0, missing)) if missing else x_NKD  # `pad` copies, whatever is missing


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
        """Return x + delta and its norm, both [N, C]; without delta, x and its norm."""
        total = x.contiguous()
        if delta is None:
            y = rowwise.norm(total, weight, eps)
        else:
            total, y = rowwise.add_norm(delta.contiguous(), total, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, y

    @staticmethod
    def backward(ctx, grad_total, grad):
        """Return the gradients by x and delta [N, C], which are the same, and by the weight [C]."""
        by_x, by_weight = rowwise.norm_backward(
            grad.contiguous(), *ctx.saved_tensors, ctx.eps, grad_total.contiguous()
        )
        return by_x, by_x if ctx.needs_input_grad[1] else None, by_weight, None


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
    def forward(ctx, x, weight, bias, dtype):
        """Return x @ weight.T + bias [N, O] in `dtype`."""
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return products.linear(x, weight, bias, dtype)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients by x [N, C], weight [O, C] and bias [O]."""
        x, weight = ctx.saved_tensors
        by_bias = grad.float().sum(0).to(grad.dtype) if ctx.biased else None
        by_x = grad @ weight.to(grad.dtype)
        by_weight = grad.T @ x.to(grad.dtype)
        return by_x.to(x.dtype), by_weight.to(weight.dtype), by_bias, None


class _Mixed(experts.Mixed):
    """The weighted sums of the outputs of experts, with the library's products in the backward pass."""

    @staticmethod
    def forward(ctx, x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E, rounding):
        """Return the weighted sums [N, C]; arguments as of `Mixed`."""
        x_NC = x_NC.contiguous()
        sorting = (order_M, ends_E)
        both_MI = grouped.spread(x_NC, gate_up_EIC, sorting, weights_NK.shape[1])
        inner_MI = rowwise.swiglu(both_MI)
        ctx.rounding = rounding
        ctx.top_k = weights_NK.shape[1]
        ctx.save_for_backward(x_NC, both_MI, inner_MI, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E)
        return grouped.gather(inner_MI, down_ECI, sorting, weights_NK.contiguous())


class _Attend(torch.autograd.Function):
    """Causal attention over the sequences of a plan."""

    @staticmethod
    def forward(ctx, q, k, v, layer, sequences, attend):
        """Return the mixed values [N, H, D]."""
        plan = sequences.plan
        q = q.contiguous()
        keys = plan.keys(k)
        values = plan.keys(v)
        kept = sequences.kept
        if kept:
            out, lse = kept.pop()
        else:
            out, lse = attend(layer, q, (keys, values), plan)
            if kept is not None:
                kept.append((out.detach(), lse))  # `out` itself would keep its graph alive
        ctx.flash = q.dtype in HALF
        ctx.save_for_backward(*((q, keys, values, out, lse) if ctx.flash else (q, k, v)))
        ctx.settings = plan, layer, len(k)
        ctx.sequences = sequences
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients by q [N, H, D], and by k and v [N, K, D]."""
        plan, layer, tokens = ctx.settings
        if not ctx.flash:
            return *_padded_gradients(layer, ctx.sequences, grad, *ctx.saved_tensors), None, None, None
        q, keys, values, out, lse = ctx.saved_tensors
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        by_q, by_keys, by_values = torch.ops.aten._flash_attention_backward(
            _widened(grad, q).contiguous(),
            q,
            keys,
            _widened(values, q),
            _widened(out, q),
            lse.T.contiguous(),
            plan.rows.starts,
            plan.key_starts,
            plan.rows.longest,
            plan.longest_key,
            0.0,
            True,
            seed,
            seed,
            **_flash(layer),
        )
        by_values = by_values[..., : values.shape[2]]
        by_k, by_v = (plan.gather_gradient(by, tokens) for by in (by_keys, by_values))
        return by_q, by_k, by_v, None, None, None


def _padded_gradients(
    layer: Layer, sequences: Sequences, grad: Tensor, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients by q [N, H, D], and by k and v [N, K, D], by torch: torch's flash kernel takes 16
    bits only."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q_NHD, k_NKD, v_NKD)]
        mixed_NHD = sequences.attend_padded(layer, *inputs)
    return torch.autograd.grad(mixed_NHD, inputs, grad)
