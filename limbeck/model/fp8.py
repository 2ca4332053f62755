"""Training in FP8 as DeepSeek-V3 does it (arXiv 2412.19437, section 3.3), simulated on any hardware.

In every matrix product with a weight of a block, in the forward pass and for both gradients, the two factors
are rounded to the format E4M3: activations and gradients in tiles of 1 x 128 values, weights in blocks of 128
x 128. Each tile or block is scaled so that its largest value becomes the largest value of the format.
Products are summed in float32. Embedding, head, routers, norms and attention scores are not rounded, nor are
the master weights, which the optimiser updates. N tokens · C inputs · O outputs.
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
    """Return x [..., N, C] rounded to E4M3, with one scale per 128 values of the last dimension."""
    return _rounded(x, 1, SIDE)


def blocks(weight: Tensor) -> Tensor:
    """Return a weight [..., O, C] rounded to E4M3, with one scale for each block of 128 x 128 values."""
    return _rounded(weight, SIDE, SIDE)


def _rounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return x [..., N, C] rounded to E4M3, with one scale per rectangle of `rows` x `columns` values."""
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
    """The product x @ weight.T of factors that are rounded to E4M3, with gradients that are rounded as well.

    In the backward pass each gradient is rounded in tiles along the dimension over which the product sums
    (DeepSeek-V3, figure 6).
    """

    @staticmethod
    def forward(ctx, x_NC, weight_OC):
        """Return the product [N, O] of the rounded factors x [N, C] and weight [O, C]."""
        rounded_OC = blocks(weight_OC)
        ctx.save_for_backward(x_NC, rounded_OC)
        return tiles(x_NC) @ rounded_OC.T

    @staticmethod
    def backward(ctx, grad_NO):
        """Return the gradients with respect to x [N, C] and to the weight [O, C]."""
        x_NC, rounded_OC = ctx.saved_tensors
        by_x_NC = tiles(grad_NO) @ rounded_OC
        by_weight_OC = tiles(grad_NO.T) @ tiles(x_NC.T).T
        return by_x_NC, by_weight_OC


class FP8Linear(Linear):
    """A linear layer that rounds its factors to E4M3 while gradients are recorded, and is exact otherwise."""

    def forward(self, x_NC: Tensor) -> Tensor:
        """Return the output of the layer, [N, O]."""
        if not torch.is_grad_enabled():
            return super().forward(x_NC)
        y_NO = _Product.apply(x_NC, self.weight)
        return y_NO if self.bias is None else y_NO + self.bias


def simulate(decoder: Decoder) -> Decoder:
    """Make all linear layers of a decoder's blocks but the routers train in simulated FP8, in place.

    Returns the same decoder. Its weights, their names and its outputs without gradients (sampling) stay the
    same.
    """
    for layer in [*decoder.blocks.modules(), *decoder.ahead.modules()]:
        if isinstance(layer, MixtureOfExperts):
            layer.rounding = (tiles, blocks)
        elif type(layer) is Linear:
            layer.__class__ = FP8Linear
    return decoder
