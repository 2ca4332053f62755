"""The matrix products of a decoder's blocks. N tokens · C inputs · O outputs."""

from __future__ import annotations

from torch import Tensor, nn

from .ops import CPU, Ops


class Linear(nn.Linear):
    """x @ weight.T + bias, by the operations of the device."""

    ops: Ops = CPU

    def forward(self, x_NC: Tensor) -> Tensor:
        """Return the output of the layer, [N, O]."""
        return self.ops.linear(x_NC, self.weight, self.bias)
