"""The matrix products of a decoder's blocks. N tokens · C inputs · O outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels

# Values of a weight up to which looking up the faster way takes longer than the difference between the two.
SMALL = 1 << 17  # values


def product(x_NC: Tensor, weight_OC: Tensor) -> Tensor:
    """Return x @ weight.T [N, O] without a gradient, by the compiled kernels where faster, else by torch."""
    if kernels.serves_product(x_NC, weight_OC):
        return kernels.linear(x_NC, weight_OC)
    return F.linear(x_NC, weight_OC)


class Linear(nn.Linear):
    """x @ weight.T + bias, by the compiled kernels where they are faster and no gradient is recorded.

    For few tokens the kernels are faster because they do not repack the weights first, as BLAS does.
    """

    def __init__(self, *sizes: int, **options: Any):
        super().__init__(*sizes, **options)
        self.small = self.in_features * self.out_features <= SMALL

    def forward(self, x_NC: Tensor) -> Tensor:
        """Return the output of the layer, [N, O]."""
        if self.small or torch.is_grad_enabled():
            return F.linear(x_NC, self.weight, self.bias)
        weight_OC = self.weight
        if not kernels.serves_product(x_NC, weight_OC):
            return F.linear(x_NC, weight_OC, self.bias)
        y_NO = kernels.linear(x_NC, weight_OC)
        return y_NO if self.bias is None else y_NO + self.bias
