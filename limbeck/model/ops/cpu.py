"""The operations of a decoder on a CPU: the compiled kernels in float32 where they are faster, else torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from . import experts
from .plain import PlainOps
from .table import Latents, Rope

if TYPE_CHECKING:
    from ..context import Layer, Sequences

# Values of a weight up to which looking up the faster way takes longer than the difference between the two.
SMALL = 1 << 17  # values


class CPUOps(PlainOps):
    """The operations on a CPU. Methods are described in `Ops`."""

    on_host = True

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return RMSNorm of x [..., C]."""
        if kernels.serves("norm", x.numel(), x, weight):
            return kernels.Normalize.apply(x, weight, eps)
        return super().norm(x, weight, eps)

    def rotate(self, x_NHD: Tensor, rope: Rope) -> Tensor:
        """Return the rotated heads [N, H, D]."""
        if kernels.serves("rotate", x_NHD.numel(), x_NHD):
            return kernels.Rotate.apply(x_NHD, *rope)
        return super().rotate(x_NHD, rope)

    def swiglu(self, both_NI: Tensor) -> Tensor:
        """Return silu(gate) * up [N, I]."""
        if kernels.serves("swiglu", both_NI.numel(), both_NI):
            return kernels.SwiGLU.apply(both_NI)
        return super().swiglu(both_NI)

    def linear(self, x_NC: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias [N, O].

        For few tokens the kernels are faster because they do not repack the weights first, as BLAS does.
        """
        if torch.is_grad_enabled() or weight_OC.numel() <= SMALL:
            return F.linear(x_NC, weight_OC, bias_O)
        if not kernels.serves_product(x_NC, weight_OC):
            return F.linear(x_NC, weight_OC, bias_O)
        y_NO = kernels.linear(x_NC, weight_OC)
        return y_NO if bias_O is None else y_NO + bias_O

    def logits(self, x_NC: Tensor, head_VC: Tensor) -> Tensor:
        """Return the logits [N, V] without a gradient."""
        if kernels.serves_product(x_NC, head_VC):
            return kernels.linear(x_NC, head_VC)
        return super().logits(x_NC, head_VC)

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
        each = chosen_NK.numel() // len(down_ECI)
        exact = rounding is experts.EXACT
        if exact and kernels.serves("mixture", each, x_NC, gate_up_EIC, down_ECI, weights_NK):
            order_M, ends_E = experts.sort_choices(chosen_NK, len(down_ECI))
            return kernels.Mixture.apply(x_NC, gate_up_EIC, down_ECI, weights_NK, order_M, ends_E)
        return super().mix_experts(x_NC, gate_up_EIC, down_ECI, chosen_NK, weights_NK, rounding)

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
        seen = min(sequences.longest, layer.window or sequences.longest)
        alike = q_NHD.shape[2] == v_NKD.shape[2]
        if alike and kernels.serves(sequences.kernel, seen, q_NHD, v_NKD):
            return kernels.Attention.apply(q_NHD, k_NKD, v_NKD, sequences.trees, layer.scale, layer.window)
        return sequences.attend_padded(layer, q_NHD, k_NKD, v_NKD)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return a token for each row and its log-probability, both [B]."""
        if temperature and kernels.serves("draw", logits_BV.shape[-1], logits_BV):
            return kernels.sample(logits_BV, uniform_B, temperature)
        return super().draw(logits_BV, uniform_B, temperature)


CPU = CPUOps()
