"""The two moments of AdamW, in float32 or in 8 bits (Dettmers et al. 2021, arXiv 2110.02861, section 2).

N numbers · B blocks of 256 numbers · S numbers of a block."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rounding import Noise

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # numbers of the smallest tensor whose moments are kept in 8 bits

State = dict[str, Tensor]


class Code(NamedTuple):
    """A code of 8 bits: where a state has it, and its least and its largest magnitude.

    A code c stands for (c / most)^2 times the largest magnitude of its block, with the sign of c. Its steps
    are fine near zero, where those of a linear code are not, and it is computed by a square root."""

    name: str
    least: int
    most: int


FIRST = Code("exp_avg", 0, 127)
ROOT = Code("exp_avg_sq", 1, 255)  # of the root of the second moment, never 0: AdamW divides by it


def begin(parameter: Tensor, device: torch.device, moments: str | None) -> State:
    """Return the state of a tensor before its first update: the count of updates, and moments of zero, on a
    device. With `moments` "int8", matrices of 4,096 numbers or more have codes [B, S] and scales [B]."""
    step = torch.zeros((), device=device)
    if moments != "int8" or parameter.ndim < 2 or parameter.numel() < SMALLEST:
        precision = torch.promote_types(parameter.dtype, torch.float32)
        shape = {"size": parameter.shape, "dtype": precision, "device": device}
        return {"step": step, "exp_avg": torch.zeros(**shape), "exp_avg_sq": torch.zeros(**shape)}
    blocks = -(-parameter.numel() // BLOCK)
    return {
        "step": step,
        "exp_avg": torch.zeros(blocks, BLOCK, dtype=torch.int8, device=device),
        "exp_avg_scale": torch.zeros(blocks, device=device),
        "exp_avg_sq": torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device),
        "exp_avg_sq_scale": torch.zeros(blocks, device=device),
    }


def read(state: State, part: slice) -> tuple[Tensor, Tensor]:
    """Return both moments [N] of a chunk of a tensor, which begins with a block; views where the state is in
    float32."""
    if "exp_avg_scale" not in state:
        return state["exp_avg"].view(-1)[part], state["exp_avg_sq"].view(-1)[part]
    first_N, root_N = (_decoded(state, part, code) for code in (FIRST, ROOT))
    return first_N, root_N.square_()


def write(state: State, part: slice, first_N: Tensor, second_N: Tensor, noise: Noise) -> None:
    """Put both moments [N] of a chunk back, as `read` gave them."""
    if "exp_avg_scale" not in state:
        return
    blocks = _blocks(part)
    for code, numbers_N in ((FIRST, first_N), (ROOT, second_N.sqrt())):
        uniform_N = noise.uniform(code.name, part.start, numbers_N)
        codes_BS, scales_B = encode(numbers_N, code, uniform_N)
        state[code.name][blocks] = codes_BS.to(state[code.name].dtype)
        state[f"{code.name}_scale"][blocks] = scales_B


def _decoded(state: State, part: slice, code: Code) -> Tensor:
    """Return the numbers [N] of a chunk that are in 8 bits."""
    blocks = _blocks(part)
    numbers_N = decode(state[code.name][blocks], state[f"{code.name}_scale"][blocks], code)
    return numbers_N[: part.stop - part.start]


def _blocks(part: slice) -> slice:
    """Return the blocks of a chunk."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def encode(numbers_N: Tensor, code: Code, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of numbers, whole numbers [B, S] in float32, and the largest magnitude of each block
    [B].

    A number between two codes becomes one of them at random, by `uniform_N` from [0, 1), so that the mean is
    right: rounded to the nearest, a moment that decays by less than half a step would never decay."""
    padding = -numbers_N.numel() % BLOCK
    numbers_BS = F.pad(numbers_N, (0, padding)).view(-1, BLOCK)
    uniform_BS = F.pad(uniform_N, (0, padding)).view(-1, BLOCK)
    magnitude_BS = numbers_BS.abs()
    scale_B1 = magnitude_BS.amax(1, keepdim=True)
    magnitude_BS.div_(scale_B1.where(scale_B1 > 0, 1)).mul_(code.most**2)
    codes_BS = magnitude_BS.sqrt().floor_()
    above_BS = magnitude_BS.sub_(codes_BS.square()).div_(
        2 * codes_BS + 1
    )  # the share of the step above a code
    codes_BS += above_BS > uniform_BS
    return codes_BS.clamp_(min=code.least).copysign_(numbers_BS), scale_B1[:, 0]


def decode(codes_BS: Tensor, scales_B: Tensor, code: Code) -> Tensor:
    """Return the numbers [N] that codes stand for, in float32, with those that fill the last block."""
    numbers_BS = codes_BS.to(torch.float32)
    return numbers_BS.mul_(numbers_BS.abs()).mul_((scales_B / code.most**2)[:, None]).view(-1)
