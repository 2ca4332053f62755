"""The tables of operations: who gets which, and that each says what the formula says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.model.attention import RMSNorm
from limbeck.model.decoder import Decoder
from limbeck.model.ops import CPU, MPSOps, PlainOps, ops_for, place, use
from limbeck.model.ops.table import Predictions
from limbeck.model.packed import Packed

TABLES = {"plain": PlainOps(), "cpu": CPU, "mps": MPSOps()}


def test_a_device_gets_its_table():
    assert ops_for("cpu") is CPU and ops_for("cpu", exact=False) is CPU
    assert type(ops_for("mps")) is MPSOps and type(ops_for("xpu")) is PlainOps
    assert ops_for("xpu:1") is ops_for("xpu:0")


def test_a_placed_model_computes_with_one_table_and_precise_angles(decoder):
    """Every layer that computes has it; angles lose nothing to the weights' type, and weights stay tied."""
    model = place(decoder(), "cpu", torch.bfloat16)
    tables = [module.ops for module in model.modules() if hasattr(module, "ops")]
    assert len(tables) > 10 and set(tables) == {CPU}
    assert model.cos.dtype == model.sin.dtype == torch.float32
    assert model.head.weight is model.embed.weight and model.embed.weight.dtype == torch.bfloat16
    plain = PlainOps()
    assert {module.ops for module in use(model, plain).modules() if hasattr(module, "ops")} == {plain}
    assert Decoder.ops is CPU


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("rows", [3, 700])
def test_a_sum_and_its_norm_have_the_bits_of_both_alone(name, rows):
    """So a block that leaves its last sum to the next norm computes what it always did."""
    torch.manual_seed(0)
    ops = TABLES[name]
    weight = torch.randn(64, requires_grad=True)
    found = [torch.randn(rows, 64, requires_grad=True) for _ in range(2)]
    wanted = [x.detach().clone().requires_grad_() for x in found]
    total, normed = ops.add_norm(*found, weight, 1e-5)
    right = wanted[0] + wanted[1]
    right_normed = ops.norm(right, weight, 1e-5)
    assert torch.equal(total, right) and torch.equal(normed, right_normed)
    upstream = torch.randn(2, rows, 64)
    for pair, leaves in (((total, normed), found), ((right, right_normed), wanted)):
        torch.autograd.backward(pair, list(upstream))
        weight.grad, gradient = None, weight.grad
        leaves.append(gradient)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(found[:2], wanted[:2], strict=True))
    assert torch.equal(found[2], wanted[2])


def test_a_decoder_has_the_bits_of_its_formula(decoder):
    """Residuals added where a reader would add them."""
    for sizes in ({}, {"parallel": True, "layer_norm": True, "gated": False}, {"qk_norm": "before"}):
        model = decoder(**sizes)
        tokens, context = torch.arange(20), Packed([12, 8])
        rope = model._rope(context)
        x = model.embed(tokens)
        for block in model.blocks:
            normed = block.attention_norm(x)
            x = x + block.attention(normed, rope, context)
            x = x + block.ffn(normed if block.ffn_norm is None else block.ffn_norm(x), context)
        assert torch.equal(model(tokens, Packed([12, 8])), model.norm(x))


@pytest.mark.parametrize("name", TABLES)
def test_operations_against_their_formulas(name):
    torch.manual_seed(0)
    ops = TABLES[name]
    x, weight = torch.randn(9, 64), torch.randn(64)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ops.norm(x, weight, 1e-5), wanted)
    torch.testing.assert_close(ops.swiglu(x), F.silu(x[:, :32]) * x[:, 32:])
    matrix, bias = torch.randn(40, 64), torch.randn(40)
    torch.testing.assert_close(ops.linear(x, matrix, bias), x @ matrix.T + bias)
    torch.testing.assert_close(ops.logits(x, matrix), x @ matrix.T)
    torch.testing.assert_close(ops.router(x, matrix), x @ matrix.T)
    torch.testing.assert_close(ops.cumulate(x), x.cumsum(-1))
    logits, uniform = 3 * torch.randn(9, 40), torch.rand(9)
    for temperature in (0.0, 0.7, 1.0):
        tokens, logprobs = ops.draw(logits, uniform, temperature)
        logp = (logits / (temperature or 1)).log_softmax(-1)
        torch.testing.assert_close(logprobs, logp.gather(1, tokens[:, None])[:, 0])
        torch.testing.assert_close(ops.logprob(logits, tokens, temperature), logprobs)
    predictions = Predictions(x, matrix, torch.arange(9), 0.7)
    logp = (x @ matrix.T / 0.7).log_softmax(-1)
    found, entropy, _ = ops.score(predictions)
    torch.testing.assert_close(found, logp[torch.arange(9), torch.arange(9)])
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))


def test_norms_of_16_bits_are_computed_in_32():
    norm = RMSNorm(64, 1e-6).bfloat16()
    x = torch.randn(5, 64, dtype=torch.bfloat16) * 100
    wanted = F.rms_norm(x.float(), (64,), norm.weight.float(), 1e-6).bfloat16()
    assert torch.equal(norm(x), wanted)
