"""Compiled kernels, where there is a C++ compiler: made at first use, kept in the user's cache, never needed.

`kernels.cpp` does in one pass over memory what torch does in many: norms, SwiGLU, rotations, attention without
padding, a whole step of decoding, and the draw of a token. All is float32 on a CPU; whatever else is asked goes
the plain way, which is also the oracle of the tests. `LIMBECK_KERNELS=off` turns them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import platformdirs
import torch
from filelock import FileLock
from torch import Tensor

if TYPE_CHECKING:
    from .cache import KVCache
    from .decoder import Decoder

SOURCE = Path(__file__).with_name("kernels.cpp")
# Sums may be taken in any order; infinities and NaN keep their meaning, so this is not -ffast-math.
FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math", "-ffp-contract=fast",
    *(["-mprefer-vector-width=512"] if platform.machine().lower() in ("x86_64", "amd64") else []),
)  # fmt: skip
PATIENCE = 300  # seconds for the compiler
FEW = 64  # tokens up to which products that read the weights where they lie are far ahead of BLAS
LANES = 16  # positions of one block of keys, and numbers of one vector


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None without a compiler, without a BLAS to share with torch, or where `LIMBECK_KERNELS` is off."""
    return found()[0]


@cache
def found() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, and where they are or why there are none."""
    if os.environ.get("LIMBECK_KERNELS", "").lower() in ("0", "off", "no"):
        return None, "turned off by LIMBECK_KERNELS"
    sgemm = _sgemm()
    if sgemm is None:
        return None, "this torch has no sgemm_ to share"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return None, "no C++ compiler (c++, g++ or clang++)"
    try:
        path = _compiled(compiler)
        kernels = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} could not make them: {said.strip().splitlines()[0] if said.strip() else error!r}"
    kernels.use_sgemm(sgemm)
    return kernels, str(path)


def _sgemm() -> ctypes.c_void_p | None:
    try:
        return ctypes.cast(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).sgemm_, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def _compiled(compiler: str) -> Path:
    """The shared library of this source, compiler and processor, made if it is not there yet."""
    made_by = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(), *FLAGS, made_by, _processor()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("LIMBECK_CACHE") or platformdirs.user_cache_dir("limbeck"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels-{key}.so"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                fresh = Path(work) / path.name
                command = [compiler, *FLAGS, str(SOURCE), "-o", str(fresh)]
                subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
                os.replace(fresh, path)
    return path


def _processor() -> str:
    """What -march=native will look at: a home directory may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def serve(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and library() is not None


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


# ---------------------------------------------------------------- row by row


class Normalize(torch.autograd.Function):
    """x / rms(x) x weight over the last dimension."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        width = x.shape[-1]
        rows, y = x.numel() // width, torch.empty_like(x)
        scale = x.new_empty(rows)
        library().norm_forward(
            _at(x), _at(weight), ctypes.c_float(eps), ctypes.c_int64(rows), width, _at(y), _at(scale), torch.get_num_threads()
        )
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad, threads = grad.contiguous(), torch.get_num_threads()
        dx, dweight = torch.empty_like(x), x.new_zeros(threads, x.shape[-1])
        library().norm_backward(
            _at(grad), _at(x), _at(weight), _at(scale), ctypes.c_int64(len(scale)), x.shape[-1], _at(dx), _at(dweight), threads
        )
        return dx, dweight.sum(0), None


class SwiGLU(torch.autograd.Function):
    """silu(gate) x up, of the two halves of the last dimension."""

    @staticmethod
    def forward(ctx, gate_up):
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], width)
        library().swiglu_forward(_at(gate_up), ctypes.c_int64(y.numel() // width), width, _at(y), torch.get_num_threads())
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        grad, by_both = grad.contiguous(), torch.empty_like(gate_up)
        width = grad.shape[-1]
        rows = ctypes.c_int64(grad.numel() // width)
        library().swiglu_backward(_at(grad), _at(gate_up), rows, width, _at(by_both), torch.get_num_threads())
        return by_both


class Rotate(torch.autograd.Function):
    """x [N, H, D] turned by its token's angles, cos and signed sin [N, 1, D]."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return _turned(grad, *ctx.saved_tensors, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sense: float) -> Tensor:
    x = _heads(x)
    rows, heads, width = x.shape
    y = x.new_empty(rows, heads, width)
    library().rotate(
        _at(x), ctypes.c_int64(x.stride(0)), _at(cos), _at(sin), ctypes.c_float(sense), ctypes.c_int64(rows), heads, width,
        _at(y), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _heads(x_NHD: Tensor) -> Tensor:
    """With its heads side by side, however far its rows are apart."""
    return x_NHD if x_NHD.stride(2) == 1 and x_NHD.stride(1) == x_NHD.shape[2] else x_NHD.contiguous()


# ---------------------------------------------------------------- attention over whole sequences


class _Trees(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int), *((name, ctypes.c_void_p) for name in ("trunk", "length", "first", "branch", "branch_length"))]


class _Asked(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in "qkv"),
        *((f"{name}_stride", ctypes.c_int64) for name in "qkv"),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "width", "window")),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


class Trees:
    """Sequences as trees: token and length of each trunk; branches in order, and how many each trunk has. Laid down
    once, as the kernels read them, for all layers and both directions."""

    def __init__(
        self, trunks: Sequence[int], lengths: Sequence[int], counts: Sequence[int] | None = None,
        branches: Sequence[int] = (), branch_lengths: Sequence[int] = (),
    ):  # fmt: skip
        first = np.cumsum([0, *(counts or [0] * len(trunks))])
        self._arrays = [np.asarray(part, dtype=np.int32) for part in (trunks, lengths, first, branches, branch_lengths)]
        self.laid = _Trees(len(trunks), *(array.ctypes.data for array in self._arrays))


class Attention(torch.autograd.Function):
    """Causal attention along every path from a trunk's begin to a branch's end: q [N, H, D], k and v [N, K, D]."""

    @staticmethod
    def forward(ctx, q, k, v, trees, scale, window):
        q, k, v = (_heads(x) for x in (q, k, v))
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2])
        asked = Attention.asked(q, k, v, scale, window)
        library().attention_forward(ctypes.byref(trees.laid), ctypes.byref(asked), _at(out), _at(lse), torch.get_num_threads())
        ctx.save_for_backward(q, k, v, lse)
        ctx.settings = trees, scale, window
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, lse = ctx.saved_tensors
        trees, scale, window = ctx.settings
        grad = grad.contiguous()
        by_q, by_k, by_v = (x.new_empty(x.shape) for x in (q, k, v))
        asked = Attention.asked(q, k, v, scale, window)
        library().attention_backward(
            ctypes.byref(trees.laid), ctypes.byref(asked), _at(grad), _at(lse), _at(by_q), _at(by_k), _at(by_v), torch.get_num_threads()
        )
        return by_q, by_k, by_v, None, None, None

    @staticmethod
    def asked(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> _Asked:
        pointers, strides = (x.data_ptr() for x in (q, k, v)), (x.stride(0) for x in (q, k, v))
        return _Asked(*pointers, *strides, q.shape[1], k.shape[1], q.shape[2], window, scale)


# ---------------------------------------------------------------- a mixture of experts


class _Experts(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "count", "top_k", "hidden", "width", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "gate_up", "down", "weights", "order", "ends", "both")),
    ]  # fmt: skip


class Mixture(torch.autograd.Function):
    """Sum over each token's experts of weight x SwiGLU(x): x [N, C], gate_up [E, 2I, C], down [E, C, I], weights
    [N, K]; `order` [M] sorts the N x K choices by expert, and expert e's end at `ends[e]`."""

    @staticmethod
    def forward(ctx, x, gate_up, down, weights, order, ends):
        x, gate_up, down, weights = (t.contiguous() for t in (x, gate_up, down, weights))
        both, y = x.new_empty(len(order), gate_up.shape[1]), torch.empty_like(x)
        saved = x, gate_up, down, weights, order, ends, both
        library().experts_forward(ctypes.byref(Mixture.laid(saved)), _at(y))
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, gate_up, down, weights, *_ = saved = ctx.saved_tensors
        grad = grad.contiguous()
        found = tuple(torch.empty_like(part) for part in (x, gate_up, down, weights))
        library().experts_backward(ctypes.byref(Mixture.laid(saved)), _at(grad), *map(_at, found))
        return *found, None, None

    @staticmethod
    def laid(saved: Sequence[Tensor]) -> _Experts:
        x, _, down, weights, *_ = saved
        count, hidden, width = down.shape
        pointers = (tensor.data_ptr() for tensor in saved)
        return _Experts(len(x), count, weights.shape[1], hidden, width, torch.get_num_threads(), *pointers)


# ---------------------------------------------------------------- decoding

_WEIGHTS = ("attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "ffn_norm", "gate_up", "down")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_WEIGHTS, "keys", "values")),
        ("window", ctypes.c_int64), ("scale", ctypes.c_float), ("eps", ctypes.c_float),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("layers", "rows", "hidden", "heads", "kv_heads", "width", "intermediate", "room", "threads")),
        *((n, ctypes.c_void_p) for n in ("embed", "norm", "cos", "sin", "tokens", "positions", "lenders", "shared")),
        *((n, ctypes.c_void_p) for n in ("x", "normed", "qkv", "mixed", "gate_up", "inner")),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


class Decoding:
    """Steps of a dense decoder, one token a row, over a `KVCache`. Its weights must stay where they are."""

    def __init__(self, model: Decoder):
        self.model, config = model, model.config
        self.layers = (_Layer * config.layers)(*(self._layer(block) for block in model.blocks))
        asked = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.widths = (config.hidden_size, config.hidden_size, asked, config.heads * config.head_dim, 2 * config.intermediate_size,
                       config.intermediate_size)  # fmt: skip
        self.scratch: list[Tensor] = []
        self.at = None

    @staticmethod
    def fits(model: Decoder) -> bool:
        """Llama's plan with its common additions: biases of q, k, v; normed heads; windows."""
        c = model.config
        plain = not (c.experts or c.latent or c.parallel or c.layer_norm or c.share_kv > 1 or c.qk_norm == "after")
        return plain and c.gated and c.rope_dim == c.head_dim and serve(model.embed.weight)

    def __call__(self, tokens_B: Tensor, cache: KVCache) -> Tensor:
        """The states [B, C] that predict the tokens after these."""
        model, config, rows = self.model, self.model.config, len(tokens_B)
        if not self.scratch or len(self.scratch[0]) < rows:
            self.scratch = [model.embed.weight.new_empty(rows, width) for width in self.widths]
        self._point(cache)
        out_BC = model.embed.weight.new_empty(rows, config.hidden_size)
        step = _Step(
            config.layers, rows, config.hidden_size, config.heads, config.kv_heads, config.head_dim, config.intermediate_size,
            cache.v_LBKTD.shape[3], torch.get_num_threads(), model.embed.weight.data_ptr(), model.norm.weight.data_ptr(),
            model.cos.data_ptr(), model.sin.data_ptr(), tokens_B.data_ptr(), cache.positions.data_ptr(), cache.lenders.ctypes.data,
            cache.shared.ctypes.data,
            *(part.data_ptr() for part in self.scratch), model.norm.eps,
        )  # fmt: skip
        library().decode(ctypes.byref(step), self.layers, _at(out_BC))
        return out_BC

    def _point(self, cache: KVCache) -> None:
        """Every layer at its keys and values; they move when the cache grows or shrinks."""
        keys, values = cache.k_LBKnDP, cache.v_LBKTD
        at = keys.data_ptr(), values.data_ptr(), keys.stride(0), values.stride(0)
        if at != self.at:
            for slot, layer in enumerate(self.layers):
                layer.keys, layer.values = at[0] + 4 * slot * at[2], at[1] + 4 * slot * at[3]
            self.at = at

    def _layer(self, block: torch.nn.Module) -> _Layer:
        attention, ffn = block.attention, block.ffn
        norms = (n and n.weight for n in (attention.q_norm, attention.k_norm))
        weights = (block.attention_norm.weight, attention.qkv.weight, attention.qkv.bias, *norms, attention.out.weight,
                   block.ffn_norm.weight, ffn.gate_up.weight, ffn.down.weight)  # fmt: skip
        pointers = (None if weight is None else weight.data_ptr() for weight in weights)
        return _Layer(*pointers, None, None, attention.layer.window, attention.layer.scale, block.attention_norm.eps)


def linear(x_BC: Tensor, weight_VC: Tensor) -> Tensor:
    """x @ weight^T: for few rows by products that read the weights once, else BLAS's."""
    x_BC, weight_VC = x_BC.contiguous(), weight_VC.contiguous()
    y_BV = x_BC.new_empty(len(x_BC), len(weight_VC))
    library().linear(_at(x_BC), _at(weight_VC), *map(ctypes.c_int, (len(x_BC), *weight_VC.shape)), _at(y_BV), torch.get_num_threads())
    return y_BV


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The first token at which the cumulative softmax passes the uniform number, and its log-probability."""
    logits_BV, uniform_B = logits_BV.contiguous(), uniform_B.contiguous()
    rows, count = logits_BV.shape
    tokens_B, logprobs_B = torch.empty(rows, dtype=torch.long), logits_BV.new_empty(rows)
    library().sample(
        _at(logits_BV), _at(uniform_B), ctypes.c_int64(rows), ctypes.c_int64(count), ctypes.c_float(temperature), _at(tokens_B),
        _at(logprobs_B), torch.get_num_threads(),
    )  # fmt: skip
    return tokens_B, logprobs_B
