"""Training in FP8 as DeepSeek-V3 does it (arXiv 2412.19437, section 3.3), simulated on any hardware.

Every product of a block's weights, forward and both ways back, gets factors rounded to E4M3: activations and
gradients in tiles of 1 x 128, weights in blocks of 128 x 128, each scaled so that its largest value is the
format's. Products are summed in float32. Embedding, head, routers, norms and the attention itself stay exact;
so do the master weights, which the optimiser updates. N tokens · C inputs · O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoder import Decoder
from .ffn import MixtureOfExperts
from .linear import Linear

LARGEST = 448.0  # the largest value of E4M3
SIDE = 128  # values of a tile's, or a block's, side


def tiles(x: Tensor) -> Tensor:
    """x [..., N, C] rounded in runs of 128 along the last dimension."""
    return _rounded(x, 1, SIDE)


def blocks(weight: Tensor) -> Tensor:
    """A weight [..., O, C] rounded in squares of 128 x 128 of the last two dimensions."""
    return _rounded(weight, SIDE, SIDE)


def _rounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x [..., N, C] rounded to E4M3, with one scale for each rectangle of `rows` x `columns`."""
    height, width = x.shape[-2:]
    rows = min(rows, height)
    columns = min(columns, width)
    padded = F.pad(x, (0, -width % columns, 0, -height % rows))
    down = padded.shape[-2] // rows
    across = padded.shape[-1] // columns
    cut = padded.reshape(*x.shape[:-2], down, rows, across, columns)
    scale = cut.abs().amax(dim=(-3, -1), keepdim=True).clamp_(min=1e-12) / LARGEST
    near = (cut / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return near.reshape(padded.shape)[..., :height, :width]


class _Product(torch.autograd.Function):
    """x @ weight.T; on the way back the gradient is rounded along the dimension that each product sums over.

    V3's figure 6.
    """

    @staticmethod
    def forward(ctx, x_NC, weight_OC):
        """The product of the rounded factors, [N, O]."""
        rounded_OC = blocks(weight_OC)
        ctx.save_for_backward(x_NC, rounded_OC)
        return tiles(x_NC) @ rounded_OC.T

    @staticmethod
    def backward(ctx, grad_NO):
        """The gradients by x [N, C] and by weight [O, C]."""
        x_NC, rounded_OC = ctx.saved_tensors
        by_x_NC = tiles(grad_NO) @ rounded_OC
        by_weight_OC = tiles(grad_NO.T) @ tiles(x_NC.T).T
        return by_x_NC, by_weight_OC


class FP8Linear(Linear):
    """A linear layer whose products are rounded while it learns; without gradients it is exact."""

    def forward(self, x_NC: Tensor) -> Tensor:
        """The output of the layer, [N, O]."""
        if not torch.is_grad_enabled():
            return super().forward(x_NC)
        y_NO = _Product.apply(x_NC, self.weight)
        return y_NO if self.bias is None else y_NO + self.bias


def simulate(decoder: Decoder) -> Decoder:
    """Let a decoder's blocks learn in FP8, routers excepted, and return it.

    Its weights, their names and the tokens that it samples stay the same.
    """
    for layer in [*decoder.blocks.modules(), *decoder.ahead.modules()]:
        if isinstance(layer, MixtureOfExperts):
            layer.rounding = (tiles, blocks)
        elif type(layer) is Linear:
            layer.__class__ = FP8Linear
    return decoder
