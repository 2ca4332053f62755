"""The matrix products of a decoder's blocks. N tokens · C inputs · O outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import kernels


class Linear(nn.Linear):
    """x w^T + b. Few tokens, as of a short prompt, meet the weights where they lie; BLAS packs them first."""

    def forward(self, x_NC: Tensor) -> Tensor:
        if len(x_NC) > kernels.FEW or torch.is_grad_enabled() or not kernels.serve(x_NC, self.weight):
            return super().forward(x_NC)
        y_NO = kernels.linear(x_NC, self.weight)
        return y_NO if self.bias is None else y_NO + self.bias
