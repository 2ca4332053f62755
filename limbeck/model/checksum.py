"""A checksum of a model's weights that is cheap enough for every step of training. N bytes of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

WORD = 8  # bytes that are added as one integer
WIDTH = 1024  # words of a row
SMALL = 1 << 18  # bytes of a weight that is summed together with others, to save calls


@torch.no_grad()
def checksum(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that tell the weights of a model from those of any of its other steps.

    Weights are summed along rows and along columns as integers, where they lie; the sums are hashed. So the
    same weights have the same checksum on every device, and a change of one weight changes it. Unlike
    `weights.digest`, it does not withstand somebody who looks for other weights of the same checksum.
    """
    raw = [weight.detach().contiguous().view(-1).view(torch.uint8) for weight in model.parameters()]
    tables = [raw_N for raw_N in raw if len(raw_N) > SMALL]
    small = [raw_N for raw_N in raw if len(raw_N) <= SMALL]
    if small:
        tables.append(torch.cat(small))
    sums = [part for table_N in tables for part in _sums(table_N)]
    hashed = torch.cat([part.view(torch.uint8) for part in sums]).cpu().numpy()
    return hashlib.sha256(hashed.tobytes()).hexdigest()[:16]


def _sums(raw_N: Tensor) -> Iterator[Tensor]:
    """Yield the sums of bytes as words, along the columns and the rows of a table of `WIDTH` words a row, and
    the bytes that fill no row."""
    row = WIDTH * WORD
    whole = len(raw_N) // row * row
    words = raw_N[:whole].view(torch.int64).view(-1, WIDTH)
    yield words.sum(0)
    yield words.sum(1)
    yield raw_N[whole:]
