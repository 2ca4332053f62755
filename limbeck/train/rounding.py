"""Stochastic rounding, with noise that is a function of what is rounded: the same on every device.

N numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import fingerprint

# The integer hash lowbias32 of Wellons' "hash-prospector": shift, multiply, shift, multiply, shift.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # as signed numbers of 32 bits


@dataclass(frozen=True)
class Noise:
    """Random bits for the numbers of one tensor in one update: a hash of a key and of a number's index.

    The bits do not depend on the device, nor on how the tensor is cut into chunks."""

    seed: object
    step: int
    name: str

    def bits(self, purpose: str, begin: int, like_N: Tensor) -> Tensor:
        """Return 32 random bits [N], as int32, for each number of a chunk that begins at index `begin`."""
        key = fingerprint("rounding", self.seed, self.step, self.name, purpose)
        x_N = torch.arange(like_N.numel(), dtype=torch.int32, device=like_N.device)
        x_N.add_(_signed(begin)).bitwise_xor_(_signed(key))
        _shift_xor_(x_N, 16).mul_(MULTIPLIERS[0]).add_(_signed(key >> 31))
        _shift_xor_(x_N, 15).mul_(MULTIPLIERS[1])
        return _shift_xor_(x_N, 16)

    def uniform(self, purpose: str, begin: int, like_N: Tensor) -> Tensor:
        """Return random numbers [N] in float32 from [0, 1), of 24 bits each, for a chunk as in `bits`."""
        return _shifted(self.bits(purpose, begin, like_N), 8).to(torch.float32).mul_(2.0**-24)


def _signed(number: int) -> int:
    """Return the lowest 32 bits of a number as a signed number."""
    return ((number + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def _shifted(x_N: Tensor, bits: int) -> Tensor:
    """Return int32 numbers [N] shifted to the right, with zeros in front whatever their sign."""
    return (x_N >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _shift_xor_(x_N: Tensor, bits: int) -> Tensor:
    """Return x ^ (x >> bits) [N], computed in place."""
    return x_N.bitwise_xor_(_shifted(x_N, bits))


def round_stochastically(x_N: Tensor, bits_N: Tensor) -> Tensor:
    """Return float32 numbers [N] rounded to bfloat16, up or down with the odds that make the mean right.

    `bits_N` are random bits in int32, of which the lower 16 count: they are added below the last bit that
    bfloat16 keeps, and what is below it then is cut off."""
    raised_N = (bits_N & 0xFFFF).add_(x_N.view(torch.int32)).bitwise_and_(-0x10000)
    return raised_N.view(torch.float32).to(torch.bfloat16)
