"""The operations of a decoder on a CPU: the compiled kernels in float32 where they are faster, else torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from .plain import PlainOps, Rope

# Values of a weight up to which looking up the faster way takes longer than the difference between the two.
SMALL = 1 << 17  # values


class CPUOps(PlainOps):
    """The operations on a CPU."""

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
        if weight_OC.numel() <= SMALL or torch.is_grad_enabled():
            return super().linear(x_NC, weight_OC, bias_O)
        if not kernels.serves_product(x_NC, weight_OC):
            return super().linear(x_NC, weight_OC, bias_O)
        y_NO = kernels.linear(x_NC, weight_OC)
        return y_NO if bias_O is None else y_NO + bias_O

    def logits(self, x_NC: Tensor, head_VC: Tensor) -> Tensor:
        """Return the logits [N, V] without a gradient."""
        if kernels.serves_product(x_NC, head_VC):
            return kernels.linear(x_NC, head_VC)
        return super().logits(x_NC, head_VC)
