"""The kernels of a card, without a card: interpreted, and compiled for four kinds of it.

Skipped where Triton is not installed: it comes with torch's builds for cards, and `pip install triton==3.6.0`
adds it to any other."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed"),
]
ARCHITECTURES = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB of shared memory of a program
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


def launches(monkeypatch, shared: int) -> list:
    """Every launch of a decode step, a prefill and an update, on a card with so much shared memory."""
    from triton.runtime.jit import JITFunction

    from limbeck.model.cuda import attention, card, experts, products, rowwise, sampling

    found: list = []
    with monkeypatch.context() as patch:
        patch.setattr(card, "shared_bytes", lambda device: shared)
        for module in (attention, experts, products, rowwise, sampling):
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, JITFunction):
                    patch.setattr(module, name, Recorder(kernel, found))
        launch_all()
    return found


def launch_all() -> None:
    """Call every function that launches kernels, with the sizes of models."""
    from limbeck.model.cuda import attention, experts, products, rowwise, sampling
    from limbeck.model.ops.table import Rows

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def whole(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    for rows in (1, 20, 64, 128, 256, 1024):
        for columns, inputs in ((1152, 896), (4608, 3584), (9728, 896)):
            products.linear(half(rows, inputs), half(columns, inputs), half(columns))
    products.linear(half(64, 896), half(1 << 17, 896), dtype=torch.float32)
    products.cumulate(torch.rand(400, 600))
    for heads, kv_heads, width in ((14, 2, 64), (12, 2, 128), (8, 8, 80)):
        pool = (half(256, kv_heads, width), half(256, kv_heads, width))
        table = Rows(whole(2, 2), whole(3), whole(2), 100)
        for window in (0, 40):
            attention.attend(half(20, heads, width), pool, table, 0.1, window)
            attention.attend_one(half(2, heads, width), pool, table.table, table.lengths, 0.1, window)
        rowwise.rotate(half(20, heads, width), torch.ones(20, 1, width), torch.ones(20, 1, width))
        rowwise.store(pool[0][:20], pool[1][:20], whole(20, dtype=torch.int64), pool)
    for heads, rank, tail in ((16, 512, 64), (40, 256, 32)):  # DeepSeek-V2-Lite, MiniCPM3
        for dtype in (torch.bfloat16, torch.float32):
            keys = torch.empty(256, 1, rank + tail, dtype=dtype)
            pool, table = (keys, keys[..., :rank]), Rows(whole(2, 2), whole(3), whole(2), 100)
            attention.attend(keys[:20].expand(-1, heads, -1), pool, table, 0.1)
            attention.attend_one(keys[:2].expand(-1, heads, -1), pool, table.table, table.lengths, 0.1)
        rowwise.store(keys[:20], None, whole(20, dtype=torch.int64), pool)
        for rows in (1, 64, 1024):
            products.per_head(half(rows, heads, 128), half(heads, 128, rank).mT)
            products.per_head(half(rows, heads, rank), half(heads, 128, rank))
    for tokens in (1, 64, 256, 512, 4096):
        sorting = whole(6 * tokens, dtype=torch.int64), whole(64)
        experts.spread(half(tokens, 2048), half(64, 2816, 2048), sorting, 6)
        experts.gather(half(6 * tokens, 1408), half(64, 2048, 1408), sorting, half(tokens, 6))
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
    for launch in launches(monkeypatch, shared):
        kernel, options, known = source(*launch)
        key = repr((known, options))
        if key in done:
            continue
        done.add(key)
        compiled = triton.compile(kernel, target=target, options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= shared, (known, options)
    assert len({key.split("'")[1] for key in done}) == 19  # all but what they call
