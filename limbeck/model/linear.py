"""The matrix products of a decoder's blocks. N tokens · C inputs · O outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels

SMALL = (
    1 << 17
)  # numbers of a weight that torch multiplies in less time than it takes to ask who is faster, up to some rows


def product(x_NC: Tensor, weight_OC: Tensor) -> Tensor:
    """x w^T, without a gradient, in the way that is fastest for so many tokens on this machine."""
    return (
        kernels.linear(x_NC, weight_OC)
        if kernels.serves_product(x_NC, weight_OC)
        else F.linear(x_NC, weight_OC)
    )


class Linear(nn.Linear):
    """x w^T + b. Few tokens, as of a short prompt, meet the weights where they lie; BLAS packs them first."""

    def __init__(self, *sizes: int, **options: Any):
        super().__init__(*sizes, **options)
        self.small = self.in_features * self.out_features <= SMALL

    def forward(self, x_NC: Tensor) -> Tensor:
        if self.small or torch.is_grad_enabled():
            return F.linear(x_NC, self.weight, self.bias)
        weight_OC = self.weight
        if not kernels.serves_product(x_NC, weight_OC):
            return F.linear(x_NC, weight_OC, self.bias)
        y_NO = kernels.linear(x_NC, weight_OC)
        return y_NO if self.bias is None else y_NO + self.bias
