"""Stochastic rounding and moments in 8 bits: the same bits everywhere, right in the mean, and near enough."""

from __future__ import annotations

import pytest
import torch

from limbeck.train import moments
from limbeck.train.rounding import Noise, round_stochastically
from limbeck.types import fingerprint

NOISE = Noise("0/zero", 3, "blocks.0.ffn.down.weight")


def test_noise_is_what_it_was():
    """Checkpoints go on with it, on another device too."""
    bits = NOISE.bits("weight", 0, torch.empty(4))
    assert bits.dtype == torch.int32
    assert [int(bit) & 0xFFFFFFFF for bit in bits] == [hashed(i) for i in range(4)]


def hashed(index: int) -> int:
    """The same in whole numbers of any size."""
    key = fingerprint("rounding", NOISE.seed, NOISE.step, NOISE.name, "weight")
    x = (index ^ key) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D + (key >> 31)) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def test_noise_does_not_depend_on_chunks_and_differs_by_what_it_is_for():
    whole = NOISE.bits("weight", 0, torch.empty(1000))
    parts = [NOISE.bits("weight", begin, torch.empty(250)) for begin in range(0, 1000, 250)]
    assert torch.equal(whole, torch.cat(parts))
    others = [
        Noise("0/zero", 4, NOISE.name).bits("weight", 0, torch.empty(1000)),
        Noise("1/zero", 3, NOISE.name).bits("weight", 0, torch.empty(1000)),
        Noise("0/zero", 3, "embed.weight").bits("weight", 0, torch.empty(1000)),
        NOISE.bits("exp_avg", 0, torch.empty(1000)),
        NOISE.bits("weight", 1000, torch.empty(1000)),
    ]
    assert all(float((other == whole).float().mean()) < 0.01 for other in others)


def test_noise_is_even_and_uncorrelated():
    """Of neighbours, of steps, and of each of the 32 bits."""
    count = 1 << 18
    draws = torch.stack(
        [Noise(0, step, "w").uniform("weight", 0, torch.empty(count)) for step in range(4)]
    ).double()
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    assert torch.allclose(draws.mean(1), torch.tensor(0.5).double(), atol=3e-3)
    assert torch.allclose(draws.var(1), torch.tensor(1 / 12).double(), atol=1e-3)
    assert float((torch.corrcoef(draws) - torch.eye(4)).abs().max()) < 0.01
    for lag in (1, 2, 16, 256, 1024):
        near = torch.corrcoef(torch.stack([draws[0, :-lag], draws[0, lag:]]))[0, 1]
        assert abs(float(near)) < 0.01, lag
    bits = NOISE.bits("weight", 0, torch.empty(count))
    for place in range(32):
        assert float(((bits >> place) & 1).double().mean()) == pytest.approx(0.5, abs=5e-3), place


def test_rounding_is_right_in_the_mean_and_leaves_what_bf16_can_say():
    torch.manual_seed(0)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), NOISE.bits("weight", 0, exact)), exact)
    x = torch.randn(64) * 10.0 ** torch.arange(-8, 8).repeat(4)
    count = 4096
    bits = torch.stack([NOISE.bits("weight", 64 * i, x) for i in range(count)])
    rounded = torch.stack([round_stochastically(x, row) for row in bits]).float()
    step = (rounded.amax(0) - rounded.amin(0)).clamp_min(1e-30)
    below = torch.where(rounded <= x, rounded, -torch.inf).amax(0)
    assert bool(((rounded == below) | (rounded == below + step)).all())  # one of two neighbours
    error = (rounded.double().mean(0) - x).abs() / step
    assert float(error.max()) < 5 * 0.5 / count**0.5


def test_updates_below_half_a_step_survive_on_average():
    """A hundredth of a step of bf16 each, which the nearest would lose."""
    weight = torch.ones(4096, dtype=torch.bfloat16)
    step = 2.0**-7  # between 1 and the next number of bf16
    for i in range(200):
        bits = Noise(0, i, "w").bits("weight", 0, weight)
        weight = round_stochastically(weight.float() + step / 100, bits)
    assert float(weight.float().mean()) == pytest.approx(1 + 2 * step, rel=0.03 * step)
    assert torch.equal((torch.ones(1) + step / 100).bfloat16(), torch.ones(1).bfloat16())


# ------------------------------------------------------------------------- moments


def coded(numbers: torch.Tensor, code: moments.Code, seed: int = 0) -> torch.Tensor:
    uniform = Noise(seed, 0, "w").uniform("exp_avg", 0, numbers)
    codes, scales = moments.encode(numbers, code, uniform)
    kept = codes.to(torch.int8 if code is moments.FIRST else torch.uint8)
    assert torch.equal(kept.float(), codes) and len(scales) == len(codes) == -(-len(numbers) // 256)
    return moments.decode(kept, scales, code)[: len(numbers)]


@pytest.mark.parametrize("code", [moments.FIRST, moments.ROOT], ids=lambda code: code.name)
def test_numbers_in_8_bits_are_right_in_the_mean(code):
    torch.manual_seed(0)
    numbers = torch.randn(700) * 1e-5
    numbers = numbers if code is moments.FIRST else numbers.abs()
    numbers[300] = 0
    drawn = torch.stack([coded(numbers, code, seed) for seed in range(2000)]).double()
    top = float(numbers.abs().max())
    assert float((drawn.mean(0) - numbers).abs().max()) < 1e-3 * top
    assert float((drawn - numbers).abs().max()) < 2.1 / code.most * top  # the widest step
    assert torch.equal(drawn[0].argmax(), numbers.argmax()) and float(drawn[0].max()) == pytest.approx(
        float(numbers.max()), rel=1e-6
    )
    near = numbers.abs() > 0.1 * top
    relative = ((drawn - numbers).abs() / numbers.abs())[:, near]
    assert float(relative.max()) < 2.2 / code.most / 0.1**0.5


def test_a_second_moment_never_becomes_zero_and_zeros_stay():
    root = torch.full((256,), 1e-12)
    root[0] = 1.0
    for seed in range(20):
        assert float(coded(root, moments.ROOT, seed).min()) > 0
    for code in (moments.FIRST, moments.ROOT):
        assert not coded(torch.zeros(300), code).any()


def test_a_moment_decays_though_a_step_of_the_code_is_larger():
    """By a thousandth an update beside one that stays, as the second moment with a decay of 0.999 does."""
    root = torch.full((4096,), 0.5)
    root[::256] = 1.0
    for step in range(300):
        root = root * 0.9995
        root[::256] = 1.0
        root = coded(root, moments.ROOT, step)
    others = root.view(-1, 256)[:, 1:]
    assert float(others.mean()) == pytest.approx(0.5 * 0.9995**300, rel=0.02)


def test_chunks_of_moments_are_the_whole():
    parameter = torch.empty(80, 80)
    state = moments.begin(parameter, torch.device("cpu"), "int8")
    torch.manual_seed(0)
    first, second = torch.randn(6400), torch.rand(6400)
    moments.write(state, slice(0, 6400), first, second, NOISE)
    pieces = moments.begin(parameter, torch.device("cpu"), "int8")
    for begin in range(0, 6400, 512):
        part = slice(begin, min(6400, begin + 512))
        moments.write(pieces, part, first[part], second[part], NOISE)
    assert all(torch.equal(state[name], pieces[name]) for name in state)
    whole = moments.read(state, slice(0, 6400))
    assert all(torch.equal(a[512:1024], b) for a, b in zip(whole, moments.read(state, slice(512, 1024))))


@pytest.mark.parametrize("shape", [(5000,), (63, 64), (64, 64)], ids=str)
def test_vectors_and_small_tensors_keep_float32(shape):
    state = moments.begin(torch.empty(shape), torch.device("cpu"), "int8")
    assert state["exp_avg"].dtype == (torch.int8 if shape == (64, 64) else torch.float32)
