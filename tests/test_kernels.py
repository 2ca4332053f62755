"""The compiled kernels against their twins in plain torch, and what happens where there are none."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.engine.decode_batch import DecodeBatch
from limbeck.engine.sampling import SamplingParams, draw
from limbeck.model import kernels
from limbeck.model.attention import RMSNorm
from limbeck.model.config import ModelConfig
from limbeck.model.context import Layer
from limbeck.model.decoder import Decoder
from limbeck.model.ffn import SwiGLU
from limbeck.model.kernels import build, choice, decode_step, trials
from limbeck.model.kernels.decode_step import DecodeStep
from limbeck.model.kv_cache import KVCache
from limbeck.model.ops import CPU
from limbeck.model.packed import Packed, SharedPrefix
from limbeck.types import LimbeckError

# Every width that this machine can run is tested on it: 4 numbers a vector, 8, 16, and whatever the processor
# itself has.
WIDTHS = ("native", "x86-64-v2", "x86-64-v3", "x86-64-v4")
NONE = f"no kernels here: {kernels.found()[1]}"


@cache
def made_for(width: str) -> tuple[ctypes.CDLL, Path]:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_MARCH", width)
        path = build.compiled(compiler, build.march(compiler))
    library = ctypes.CDLL(str(path))
    library.use_sgemm(build.sgemm())
    return library, path


@pytest.fixture(params=WIDTHS)
def compiled(request, monkeypatch):
    """The kernels of one width do everything, whatever is fastest here."""
    if kernels.library() is None:
        pytest.skip(NONE)
    if request.param != "native" and platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"{request.param} is not for this processor")
    try:
        library = made_for(request.param)
    except LimbeckError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(build, "found", lambda: library)
    monkeypatch.setattr(kernels, "serves", lambda operation, size, *tensors: kernels.takes(*tensors))
    monkeypatch.setattr(decode_step, "serves", lambda operation, size, *tensors: kernels.takes(*tensors))
    monkeypatch.setattr(kernels, "serves_product", kernels.takes)
    return library[0]


@pytest.fixture
def plainly(monkeypatch):
    """Runs a function without the kernels."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "serves", lambda *_: False)
            patch.setattr(kernels, "serves_product", lambda *_: False)
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
    "branched": lambda: SharedPrefix(3, 6, [2, 0, 1, 1, 0, 2], [0, 1, 5, 17, 60, 61]),
    "alone": lambda: Packed([1]),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("width", "heads", "kv_heads"),
    [(16, 4, 2), (64, 9, 3), (8, 2, 1), (5, 3, 3), (24, 2, 2), (80, 4, 2), (128, 2, 1), (1, 2, 2)],
)
@pytest.mark.parametrize("window", [0, 7])
def test_attention_and_its_gradients_equal_torchs(compiled, context, width, heads, kv_heads, window, plainly):
    torch.manual_seed(0)
    layer, tokens = Layer(0, width**-0.5, window), len(CONTEXTS[context]().positions)
    inputs = [torch.randn(tokens, count, width) for count in (heads, kv_heads, kv_heads)]

    def attend():
        return gradients(lambda q, k, v: CONTEXTS[context]().attend(layer, q, k, v), *inputs)

    assert_alike(attend(), plainly(attend))


def test_attention_reads_queries_keys_and_values_where_they_lie(compiled, plainly):
    """Slices of one product, as the decoder has them."""
    torch.manual_seed(0)
    whole = torch.randn(30, 6, 16)

    def attend():
        return gradients(
            lambda x: Packed([10, 20]).attend(Layer(0, 0.25, 0), *x.split([4, 1, 1], dim=1)), whole
        )

    assert_alike(attend(), plainly(attend))


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_and_their_gradients_equal_torchs(compiled, threads, plainly):
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
        found = (
            gradients(norm, x * 8) + gradients(ffn, x * 8) + gradients(lambda h: CPU.rotate(h, rope), heads)
        )
        return found + [p.grad.clone() for module in (norm, ffn) for p in module.parameters()]

    try:
        assert_alike(run(), plainly(run))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_mixture_and_its_gradients_equal_torchs(compiled, tokens, threads, plainly):
    """Among five tokens there are experts that nobody meets."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    scores = torch.randn(tokens, 8)
    chosen = scores.topk(2).indices
    inputs = torch.randn(tokens, 24), torch.randn(8, 40, 24), torch.randn(8, 24, 20), torch.rand(tokens, 2)

    def run():
        return gradients(
            lambda x, gate_up, down, weights: CPU.mix_experts(x, gate_up, down, chosen, weights), *inputs
        )

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
    "heads of 80": {"head_dim": 80, "heads": 2, "kv_heads": 1},
    "eight queries a key": {"heads": 8, "kv_heads": 1},
    "narrow heads": {"head_dim": 6},
    "ragged": {"vocab_size": 101, "hidden_size": 52, "intermediate_size": 43},
    "gelu": {"gelu": True},
    "norms from one": {"norms_from_one": True, "qk_norm": "before"},
    "norms of outputs": {"post_norms": True},
    "scaled embeddings": {"scaled_embeddings": True, "query_scalar": 24},
    "two bases": {"windows": (5, 0), "local_theta": 100.0},
    "gemma": {
        "qk_norm": "before",
        "gelu": True,
        "norms_from_one": True,
        "post_norms": True,
        "scaled_embeddings": True,
        "query_scalar": 24,
        "windows": (5, 0),
        "local_theta": 100.0,
        "heads": 4,
        "kv_heads": 1,
        "head_dim": 32,
    },
}


def model(**changes) -> Decoder:
    shape = {
        "vocab_size": 96,
        "hidden_size": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 16,
        "intermediate_size": 80,
    }
    decoder = Decoder(ModelConfig("llama", **(shape | changes))).initialize(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)), alpha=0.3
                )
    return decoder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", range(3))
@torch.no_grad()
def test_steps_of_decoding_equal_a_whole_forward_pass(compiled, way, name, plainly):
    """Rows of different ages, a prompt forked, rows dropped on the way; against the packed pass in plain
    torch. Each way of multiplying is taken."""
    compiled.use_ways((ctypes.c_int8 * 32)(*[way] * 32))
    decoder = model(**MODELS[name])
    tokens = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(1))
    begun, step = [4, 9, 6], DecodeStep(decoder)
    prefill = Packed(begun).keep()
    decoder(torch.cat([row[:n] for row, n in zip(tokens, begun, strict=True)]), prefill)
    cache = KVCache(decoder.config, compiled=True)
    cache.fork(prefill, [1, 1, 1])
    assert DecodeStep.fits(decoder)
    said, rows = {0: [], 1: [], 2: []}, [0, 1, 2]
    for i in range(14):
        if i == 6:
            rows = [0, 2]
            cache.select_rows(np.array(rows))
        cache.advance()
        states = step(tokens[rows, [begun[row] + i for row in rows]], cache)
        for row, state in zip(rows, states, strict=True):
            said[row].append(state)
    for row, states in said.items():
        length = begun[row] + len(states)
        whole = plainly(lambda row=row, length=length: decoder(tokens[row, :length], Packed([length])))
        torch.testing.assert_close(torch.stack(states), whole[begun[row] :], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"gated": False}, {"parallel": True}, {"layer_norm": True}, {"share_kv": 2}, {"qk_norm": "after"}],
    ids=str,
)
def test_what_the_step_does_not_know_goes_the_plain_way(changes):
    assert not DecodeStep.fits(model(**changes))
    assert DecodeBatch(model(**changes), 0, SamplingParams()).decoding is None


def test_float64_goes_the_plain_way():
    assert not kernels.takes(torch.zeros(1, dtype=torch.float64))
    assert not DecodeStep.fits(model().double())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 100, 128, 150])
@pytest.mark.parametrize(("columns", "inner"), [(96, 64), (48, 33), (101, 48), (49, 7), (1, 1), (50, 300)])
def test_products_equal_torchs_in_every_way(compiled, rows, columns, inner):
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, inner, generator=random), torch.randn(columns, inner, generator=random)
    exact = (x.double() @ weight.double().T).float()
    for way in range(3):
        torch.testing.assert_close(kernels.linear(x, weight, way), exact, atol=1e-5 * inner**0.5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_drawn_equal_torchs(compiled, temperature, plainly):
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2000, 300, generator=random)
    uniforms = torch.rand(2000, dtype=torch.float64, generator=random)
    params = SamplingParams(temperature=temperature)
    ours = draw(logits, uniforms, torch.zeros(2000), params)
    plain = plainly(lambda: draw(logits, uniforms, torch.zeros(2000), params))
    assert (ours.tokens_B == plain.tokens_B).float().mean() >= 0.999  # a number may lie on an edge
    same = ours.tokens_B == plain.tokens_B
    torch.testing.assert_close(ours.logprobs_B[same], plain.logprobs_B[same], atol=1e-5, rtol=1e-5)


def test_tokens_drawn_follow_their_probabilities(compiled):
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]]).expand(60_000, 4)
    uniforms = torch.rand(60_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = kernels.sample(logits, uniforms, 1.0)
    share = torch.bincount(tokens, minlength=4) / 60_000
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=0.008, rtol=0)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


LANES = {"x86-64-v2": 4, "x86-64-v3": 8, "x86-64-v4": 16}


def test_vectors_are_as_wide_as_what_was_compiled_for(compiled, request):
    width = request.node.callspec.params["compiled"]
    assert kernels.lanes() == LANES.get(width, kernels.lanes()) in (4, 8, 16)
    assert kernels.instructions() in ("AVX-512", "AVX2", "SSE2", "NEON")


# ---------------------------------------------------------------- ours or torch's


@pytest.fixture
def choosing(own_choice):
    """Choices are made anew, and kept elsewhere; where there are kernels to choose."""
    if kernels.library() is None:
        pytest.skip(NONE)
    return own_choice


def pretended(ours: float, plain: float):
    """Seconds as if they had been measured; of the ways to multiply, strips are the fastest."""

    def interleaved(*sides, turns: int = 0, forcing: object = None) -> list[float]:
        return [ours, plain] if forcing else [2.0, 3.0, 1.0][-len(sides) :]

    return interleaved


@pytest.mark.parametrize(("ours", "plain", "faster"), [(1.0, 2.0, "ours"), (2.0, 1.0, "torch")])
def test_the_faster_one_is_used_and_the_choice_is_kept(choosing, monkeypatch, ours, plain, faster):
    monkeypatch.setattr(choice, "interleaved", pretended(ours, plain))
    x = torch.zeros(4, 8)
    for operation, classes in trials.OPERATIONS.items():
        for size in (*classes.largest[:-1], 1e12):
            assert kernels.serves(operation, size, x) == (faster == "ours")
    assert all((row.used == "torch") == (faster == "torch") for row in kernels.timings())
    monkeypatch.setattr(choice, "interleaved", None)  # measured once, and read from the disk from now on
    kept, choice._choices = kernels.current(), {}
    assert kernels.current() == kept and list(choosing.glob("choice-*-1.json"))


def test_a_choice_that_cannot_be_kept_is_made_all_the_same(choosing, monkeypatch):
    (choosing / "file").touch()
    monkeypatch.setattr(choice, "folder", lambda: choosing / "file" / "nowhere")
    monkeypatch.setattr(choice, "interleaved", pretended(1.0, 2.0))
    assert kernels.current().used["norm"] == [True, True] and kernels.timings()
    assert [path.name for path in choosing.iterdir()] == ["file"]


@pytest.mark.slow
def test_every_class_of_every_operation_is_timed(choosing, monkeypatch):
    """For real, each piece of work once: that it runs both ways is what counts here."""
    monkeypatch.setattr(choice, "TURNS", 1)
    monkeypatch.setattr(choice, "LEAST", 0)
    monkeypatch.setattr(choice, "LONG", 1e9)
    rows = kernels.timings()
    assert len(rows) == len(trials.MOST) * len(trials.WIDEST) + sum(
        len(o.trials) for o in trials.OPERATIONS.values()
    )
    assert all(
        len(o.largest) == len(o.trials) and o.largest[-1] == float("inf") for o in trials.OPERATIONS.values()
    )
    assert all(row.ours > 0 and row.torch > 0 for row in rows)


def test_products_go_the_way_that_was_fastest(choosing, monkeypatch):
    monkeypatch.setattr(choice, "interleaved", pretended(1.0, 4.0))
    x, weight = torch.randn(16, 320), torch.randn(96, 320)
    assert kernels.serves_product(x, weight)
    assert not kernels.serves_product(torch.randn(129, 320), weight)  # so many rows are BLAS's
    assert torch.equal(kernels.linear(x, weight), kernels.linear(x, weight, way=2))
    assert not torch.equal(kernels.linear(x, weight), kernels.linear(x, weight, way=0))


def test_a_stage_goes_on_with_the_choice_that_it_began_with(choosing, monkeypatch):
    monkeypatch.setattr(choice, "interleaved", pretended(1.0, 2.0))
    began = json.loads(json.dumps(kernels.record()))
    assert kernels.current().used["norm"] == [True, True]
    monkeypatch.setattr(choice, "interleaved", pretended(2.0, 1.0))
    kernels.forget()
    assert kernels.current().used["norm"] == [False, False]  # what this machine would do now
    assert kernels.adopt(began) == "" and kernels.record() == began
    assert kernels.adopt({"instructions": "none"}) == "" and kernels.current() == choice.Choice.all(False)
    told = kernels.adopt({**began, "instructions": "AVX9"})
    assert "AVX9" in told and kernels.instructions() in told and "bytes will differ" in told
    assert kernels.adopt(None) == "" and kernels.current().used["norm"] == [False, False]


SAY = "from limbeck.model import kernels; print(kernels.found()[1])"


def found_with(**environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("LIMBECK_KERNELS", "CXX")}
    done = subprocess.run(
        [sys.executable, "-c", SAY], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("variable", ["LIMBECK_KERNELS", "LIMBECK_MARCH"])
def test_a_wrong_wish_is_refused_in_one_sentence(variable, monkeypatch):
    monkeypatch.setenv(variable, "perhaps")
    with pytest.raises(LimbeckError, match=f"{variable}.*x86-64-v3|{variable}=perhaps: say off"):
        build.mode() if variable == "LIMBECK_KERNELS" else build.march(shutil.which("c++") or "c++")


@pytest.mark.slow
def test_without_kernels_the_reason_is_told(tmp_path):
    assert "LIMBECK_KERNELS" in found_with(LIMBECK_KERNELS="off")
    assert "no C++ compiler" in found_with(PATH=str(tmp_path), LIMBECK_CACHE=str(tmp_path))
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho version 1\n[ $1 = --version ] || { echo 'no room' >&2; exit 1; }\n")
    broken.chmod(0o755)
    assert "no room" in found_with(CXX=str(broken), LIMBECK_CACHE=str(tmp_path))
    assert not list(tmp_path.glob("*.so"))


@pytest.mark.slow
@pytest.mark.skipif(kernels.library() is None, reason=NONE)
def test_two_processes_that_compile_at_once_share_one_library(tmp_path):
    environment = os.environ | {"LIMBECK_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", SAY], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate()[0].strip() for process in both}
    assert said == {str(path) for path in tmp_path.glob("kernels-*.so")} and len(said) == 1
