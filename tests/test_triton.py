"""The kernels of a card, without a card: interpreted, and compiled for four kinds of it.

Triton comes with torch's builds for cards, and with the development extra on Linux; these tests are skipped
where it has no build."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from test_device_batch import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck.engine.device_batch import DeviceBatch
from limbeck.engine.device_speculative import DeviceSpeculation
from limbeck.engine.sampling import SamplingParams
from limbeck.model.ops import use

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed"),
]
ARCHITECTURES = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB of shared memory of a program
LIKE = {80, 89, 90}  # of them, the last launch of each kernel only; 86 has the least shared memory
TYPES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def test_what_the_kernels_mean():
    """`interpreted.py`, in a process of its own."""
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted.py"]
    environment = tiny.environment(TRITON_INTERPRET="1", PYTEST_ADDOPTS="")
    run = subprocess.run(command, capture_output=True, text=True, cwd=tests, env=environment, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


class Recorder:
    """Stands for a kernel and writes down how it is launched."""

    def __init__(self, kernel, launches: list):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *given, **named: self.launches.append((self.kernel, given, named))


@contextmanager
def recorded(monkeypatch, shared: int):
    """The launches of kernels, none of which runs, on a card with so much shared memory of a program."""
    from triton.runtime.jit import JITFunction

    from limbeck.model.cuda import attention, card, experts, products, rowwise, sampling

    found: list = []
    with monkeypatch.context() as patch:
        patch.setattr(card, "shared_bytes", lambda device: shared)
        for module in (attention, experts, products, rowwise, sampling):
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, JITFunction):
                    patch.setattr(module, name, Recorder(kernel, found))
        yield found


def half(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def whole(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def launch_products() -> None:
    """Dense ones, those of heads, and those of experts; the largest tile comes last."""
    from limbeck.model.cuda import experts, products

    products.linear(half(64, 896), half(1 << 17, 896), dtype=torch.float32)
    products.cumulate(torch.rand(400, 600))
    for heads, rank in ((16, 512), (40, 256)):
        for rows in (1, 1024):
            products.per_head(half(rows, heads, 128), half(heads, 128, rank).mT)
            products.per_head(half(rows, heads, rank), half(heads, 128, rank))
    for rows in (1, 20, 64, 128, 256, 1024):
        for columns, inputs in ((1152, 896), (9728, 3584)):
            products.linear(half(rows, inputs), half(columns, inputs), half(columns))
    for tokens in (1, 512, 4096):
        sorting = whole(6 * tokens, dtype=torch.int64), whole(64)
        experts.gather(half(6 * tokens, 1408), half(64, 2048, 1408), sorting, half(tokens, 6))
        experts.spread(half(tokens, 2048), half(64, 2816, 2048), sorting, 6)


def launch_attention(heads: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """A prefill, and a decode step with and without a window."""
    from limbeck.model.cuda import attention, rowwise
    from limbeck.model.ops.table import Rows

    q = half(20, heads, keys.shape[2], dtype=keys.dtype)
    rows = Rows(whole(2, 2), whole(3), whole(2), 100)
    for window in (0, 40):
        attention.attend(q, (keys, values), rows, 0.1, window)
        attention.attend_one(q[:2], (keys, values), rows.table, rows.lengths, 0.1, window)
    shared = keys.shape != values.shape
    rowwise.store(keys[:20], None if shared else values[:20], whole(20, dtype=torch.int64), (keys, values))


def launch_all() -> None:
    """Call every function that launches kernels, with the sizes of models."""
    from limbeck.model.cuda import rowwise, sampling

    launch_products()
    for dtype in (torch.float32, torch.bfloat16):
        launch_attention(12, *half(2, 256, 2, 128, dtype=dtype))
    for heads, kv_heads, width in ((14, 2, 64), (8, 4, 256)):
        launch_attention(heads, *half(2, 256, kv_heads, width))
    for dtype, heads, rank, tail in (  # MiniCPM3, DeepSeek-V2-Lite
        (torch.bfloat16, 40, 256, 32),
        (torch.float32, 16, 512, 64),
        (torch.bfloat16, 16, 512, 64),
    ):
        latents = half(256, 1, rank + tail, dtype=dtype)
        launch_attention(heads, latents, latents[..., :rank])
    for width in (64, 128):
        rowwise.rotate(half(20, 14, width), torch.ones(20, 1, width), torch.ones(20, 1, width))
    for width in (896, 3584):
        x = half(20, width)
        rowwise.norm(x, half(width), 1e-6)
        rowwise.add_norm(x, x, half(width), 1e-6)
        rowwise.norm_backward(x, x, half(width), 1e-6)
        rowwise.norm_backward(x, x, half(width), 1e-6, x)
    rowwise.swiglu(half(20, 9728))
    rowwise.swiglu_backward(half(20, 4864), half(20, 9728))
    logits, tokens = torch.empty(4, 151936), whole(4, dtype=torch.int64)
    for temperature in (0.0, 0.7):
        sampling.draw(logits, torch.rand(4), temperature)
    sampling.logprob(logits, tokens, 0.7)
    sampling.score(logits, tokens, 0.7)
    sampling.score_backward(logits, tokens, torch.rand(4), torch.rand(4), 0.7, torch.bfloat16)


def source(kernel, given: tuple, named: dict) -> tuple:
    """The kernel as the compiler takes it, and its options, as the launch says them."""
    from triton.compiler import ASTSource

    options = {name: named[name] for name in ("num_warps", "num_stages") if name in named}
    values = dict(zip(kernel.arg_names, given, strict=False))
    values.update({name: value for name, value in named.items() if name in kernel.arg_names})
    constant = {kernel.arg_names[i] for i in kernel.constexprs}
    signature, constants, divisible = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in constant or value is None:
            signature[name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            divisible[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                divisible[(place,)] = [["tt.divisibility", 16]]
    return (
        ASTSource(kernel, signature, constants, divisible),
        options,
        (kernel.__name__, signature, constants),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_fits(monkeypatch, architecture):
    """For A100, RTX 3090, RTX 4090 and H100: down to machine code, within their shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget

    shared = ARCHITECTURES[architecture] << 10
    target = GPUTarget("cuda", architecture, 32)
    done = set()
    with recorded(monkeypatch, shared) as found:
        launch_all()
    if architecture in LIKE:
        found = {kernel: (kernel, *rest) for kernel, *rest in found}.values()
    for launch in found:
        kernel, options, known = source(*launch)
        key = repr((known, options))
        if key in done:
            continue
        done.add(key)
        compiled = triton.compile(kernel, target=target, options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= shared, (known, options)
    assert len({key.split("'")[1] for key in done}) == 19  # all but what they call


class OnCard(TorchDispatchMode):
    """Forbids tensors of the host, but for numbers."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            assert not isinstance(x, torch.Tensor) or x.is_meta or not x.ndim, function.name()
        return result


@pytest.mark.parametrize("kind", [DeviceBatch, DeviceSpeculation])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_on_a_card_waits_for_nothing(monkeypatch, decoder, family, kind):
    """On tensors that have no values: whatever asks for one, as a wait for the card does, fails."""
    from limbeck.model.ops.cuda import CUDAOps

    monkeypatch.setattr(CUDAOps, "free_bytes", lambda self, device: 1 << 30)
    model = decoder(torch.bfloat16, **{"head_dim": 16, "predicted": kind.modules, **FAMILIES[family]})
    with recorded(monkeypatch, 227 << 10) as found, torch.no_grad():
        sampling = SamplingParams(0.7, 0.9, 20, force={3: 4})
        batch = kind(use(model.to("meta"), CUDAOps()), 0, sampling, 6, 8)
        with OnCard():
            batch._step(4)
    with pytest.raises(RuntimeError, match="item"):
        bool(batch.state.alive_B[0])
    names = {kernel.__name__ for kernel, *_ in found}
    assert {"_linear", "_attend_segments", "_merge_segments", "_store", "_draw"} <= names
    assert ({"_grouped", "_sum_choices"} <= names) == bool(model.config.experts)
