"""The compiled kernels against their twins in plain torch, and what happens where there are none."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from limbeck.engine.flight import Flight
from limbeck.engine.sampling import SamplingParams, draw
from limbeck.model import cache, kernels
from limbeck.model.attention import Layer, RMSNorm, rotate
from limbeck.model.cache import Branched, KVCache, Packed
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.ffn import SwiGLU, experts_mixed

compiled = pytest.mark.skipif(kernels.library() is None, reason=f"no kernels here: {kernels.found()[1]}")


@pytest.fixture
def plainly(monkeypatch):
    """Runs a function without the kernels."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "serve", lambda *_: False)
            return function()

    return run


def gradients(function, *inputs):
    """What a function of tensors gives, and its gradients for a fixed gradient of the output."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return [out.detach(), *(x.grad for x in inputs)]


def assert_alike(ours, plain, tolerance=1e-5):
    for mine, theirs in zip(ours, plain, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


CONTEXTS = {
    "packed": lambda: Packed([3, 40, 9, 17, 100]),
    "branched": lambda: Branched(3, 6, [2, 0, 1, 1, 0, 2], [0, 1, 5, 17, 60, 61]),
    "alone": lambda: Packed([1]),
}


@compiled
def test_long_sequences_go_the_other_way_and_arrive_at_the_same_place(monkeypatch):
    given = [torch.randn(60, heads, 16) for heads in (4, 2, 2)]

    def attend(*qkv):
        return Packed([50, 10]).attend(Layer(0, 0.25, 0), *qkv)

    ours = gradients(attend, *given)
    monkeypatch.setattr(cache, "LONG", 40)
    monkeypatch.setattr(kernels.Attention, "apply", None)  # not to be called
    assert_alike(ours, gradients(attend, *given))


@compiled
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("width", "heads", "kv_heads"), [(16, 4, 4), (16, 4, 2), (64, 9, 3), (8, 2, 1), (24, 2, 2), (128, 2, 1)])
@pytest.mark.parametrize("window", [0, 7])
def test_attention_and_its_gradients_equal_torchs(context, width, heads, kv_heads, window, plainly):
    torch.manual_seed(0)
    layer, tokens = Layer(0, width**-0.5, window), len(CONTEXTS[context]().positions)
    inputs = [torch.randn(tokens, count, width) for count in (heads, kv_heads, kv_heads)]

    def attend():
        return gradients(lambda q, k, v: CONTEXTS[context]().attend(layer, q, k, v), *inputs)

    assert_alike(attend(), plainly(attend))


@compiled
def test_attention_reads_queries_keys_and_values_where_they_lie(plainly):
    """Slices of one product, as the decoder has them."""
    torch.manual_seed(0)
    whole = torch.randn(30, 6, 16)

    def attend():
        return gradients(lambda x: Packed([10, 20]).attend(Layer(0, 0.25, 0), *x.split([4, 1, 1], dim=1)), whole)

    assert_alike(attend(), plainly(attend))


@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_and_their_gradients_equal_torchs(threads, plainly):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    norm, ffn = RMSNorm(48, 1e-5), SwiGLU(48, 40)
    norm.weight.data.normal_()
    angles = torch.randn(33, 1, 8)
    rope = torch.cat([angles.cos(), angles.cos()], -1), torch.cat([-angles.sin(), angles.sin()], -1)

    def run():
        random = torch.Generator().manual_seed(1)
        x, heads = torch.randn(33, 48, generator=random), torch.randn(33, 3, 16, generator=random)
        norm.zero_grad(), ffn.zero_grad()
        found = gradients(norm, x * 8) + gradients(ffn, x * 8) + gradients(lambda h: rotate(h, rope), heads)
        return found + [p.grad.clone() for module in (norm, ffn) for p in module.parameters()]

    try:
        assert_alike(run(), plainly(run))
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_mixture_and_its_gradients_equal_torchs(tokens, threads, plainly):
    """Among five tokens there are experts that nobody meets."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    scores = torch.randn(tokens, 8)
    chosen = scores.topk(2).indices
    inputs = torch.randn(tokens, 24), torch.randn(8, 40, 24), torch.randn(8, 24, 20), torch.rand(tokens, 2)

    def run():
        return gradients(lambda x, gate_up, down, weights: experts_mixed(x, gate_up, down, chosen, weights), *inputs)

    try:
        assert_alike(run(), plainly(run))
    finally:
        torch.set_num_threads(before)


MODELS = {
    "llama": {},
    "grouped": {"kv_heads": 2},
    "biased": {"qkv_bias": True},
    "normed heads": {"qk_norm": "before"},
    "windowed": {"windows": (5, 0)},
    "wide heads": {"head_dim": 24},
}


def model(**changes) -> Decoder:
    shape = {"vocab_size": 96, "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 16, "intermediate_size": 80}
    decoder = Decoder(ModelConfig("llama", **(shape | changes))).initialize(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)), alpha=0.3)
    return decoder


@compiled
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_of_decoding_equal_a_whole_forward_pass(name, plainly):
    """Rows of different ages, a prompt forked, rows dropped on the way; against the packed pass in plain torch."""
    decoder = model(**MODELS[name])
    tokens = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(1))
    begun, step = [4, 9, 6], kernels.Decoding(decoder)
    prefill = Packed(begun).keep()
    decoder(torch.cat([row[:n] for row, n in zip(tokens, begun, strict=True)]), prefill)
    cache = KVCache(decoder.config, compiled=True)
    cache.fork(prefill, [1, 1, 1])
    assert kernels.Decoding.fits(decoder)
    said, rows = {0: [], 1: [], 2: []}, [0, 1, 2]
    for i in range(14):
        if i == 6:
            rows = [0, 2]
            cache.keep(np.array(rows))
        cache.advance()
        states = step(tokens[rows, [begun[row] + i for row in rows]], cache)
        for row, state in zip(rows, states, strict=True):
            said[row].append(state)
    for row, states in said.items():
        length = begun[row] + len(states)
        whole = plainly(lambda row=row, length=length: decoder(tokens[row, :length], Packed([length])))
        torch.testing.assert_close(torch.stack(states), whole[begun[row] :], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"gated": False}, {"parallel": True}, {"layer_norm": True}, {"share_kv": 2}, {"qk_norm": "after"}], ids=str
)
def test_what_the_step_does_not_know_goes_the_plain_way(changes):
    assert not kernels.Decoding.fits(model(**changes))
    assert Flight(model(**changes), 0, SamplingParams()).decoding is None


def test_float64_goes_the_plain_way():
    assert not kernels.serve(torch.zeros(1, dtype=torch.float64))
    assert not kernels.Decoding.fits(model().double())


@compiled
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_drawn_equal_torchs(temperature, plainly):
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2000, 300, generator=random)
    uniforms = torch.rand(2000, dtype=torch.float64, generator=random)
    params = SamplingParams(temperature=temperature)
    ours = draw(logits, uniforms, torch.zeros(2000), params)
    plain = plainly(lambda: draw(logits, uniforms, torch.zeros(2000), params))
    assert (ours.tokens_B == plain.tokens_B).float().mean() >= 0.999  # a number may lie on an edge
    same = ours.tokens_B == plain.tokens_B
    torch.testing.assert_close(ours.logprobs_B[same], plain.logprobs_B[same], atol=1e-5, rtol=1e-5)


@compiled
def test_tokens_drawn_follow_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]]).expand(60_000, 4)
    uniforms = torch.rand(60_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = kernels.sample(logits, uniforms, 1.0)
    share = torch.bincount(tokens, minlength=4) / 60_000
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=0.008, rtol=0)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


SAY = "from limbeck.model import kernels; print(kernels.found()[1])"


def found_with(**environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("LIMBECK_KERNELS", "CXX")}
    done = subprocess.run([sys.executable, "-c", SAY], env=inherited | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_without_kernels_the_reason_is_told(tmp_path):
    assert "LIMBECK_KERNELS" in found_with(LIMBECK_KERNELS="off")
    assert "no C++ compiler" in found_with(PATH=str(tmp_path), LIMBECK_CACHE=str(tmp_path))
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho version 1\n[ $1 = --version ] || { echo 'no room' >&2; exit 1; }\n")
    broken.chmod(0o755)
    assert "no room" in found_with(CXX=str(broken), LIMBECK_CACHE=str(tmp_path))
    assert not list(tmp_path.glob("*.so"))


@compiled
def test_two_processes_that_compile_at_once_share_one_library(tmp_path):
    environment = os.environ | {"LIMBECK_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", SAY], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in both}
    assert said == {str(path) for path in tmp_path.glob("kernels-*.so")} and len(said) == 1
