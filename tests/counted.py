"""The memory of an update as a card would need it, counted on the CPU.

`card_ops` are the operations of a card (model/ops/cuda.py) whose kernels are replaced by functions of torch
that make the same tensors; `peak_bytes` counts the bytes of all tensors that are alive at once. So what the
backward pass keeps, and when it is freed, is the code's own; only the kernels' inner memory is not seen."""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

UNITS = 132  # multiprocessors of an H100
LOGITS = 1 << 14  # logits in memory at once
KERNELS = ("attention", "experts", "products", "rowwise", "sampling")


class Count(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive: `now`, and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors, each memory once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.storages:
                size = storage.nbytes()
                self.storages[key] = weakref.ref(storage, self._freed(key, size))
                self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            del self.storages[key]
            self.now -= size

        return forget

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor))
        return result


def peak_bytes(run: Callable[[], object], *held: Iterable[Tensor]) -> int:
    """The most bytes alive while `run` runs; `held` are the tensors that there are before."""
    with Count() as count:
        for tensors in held:
            count.add(tensors)
        run()
    return count.peak


# ---------------------------------------------------------------- kernels


def _attend(q: Tensor, pool: tuple[Tensor, Tensor], rows, scale: float, window: int):
    """Attention's results; every query gets its first key's value, for only sizes count."""
    group = q.shape[1] // pool[1].shape[1]
    out = pool[1][: len(q)].repeat_interleave(group, 1) if group > 1 else pool[1][: len(q)].clone()
    return out, q.new_zeros(q.shape[:2], dtype=torch.float32)


def _flash_backward(grad, q, keys, values, *rest, **settings):
    """The gradients of torch's flash attention, deterministic: those by the queries are summed in parts, so
    many that the card is full, those by keys and values for every query head (torch's flash_api.cpp)."""
    sequences = len(rest[2]) - 1
    parts = -(-UNITS // (sequences * q.shape[1]))
    width = -(-q.shape[2] // 32) * 32
    by_q, by_keys, by_values = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    _sums = q.new_zeros(parts, len(q) + 128 * sequences, q.shape[1], width, dtype=torch.float32)
    if keys.shape[1] < q.shape[1]:
        _expanded = q.new_zeros(2, len(keys), q.shape[1], q.shape[2])
    return by_q, by_keys, by_values


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    if dtype:
        return torch.ones(len(x), len(weight), dtype=dtype)  # sums of weights are divided by
    return torch.nn.functional.linear(x, weight, bias)


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:2], weight.shape[1])


def _spread(x: Tensor, weight: Tensor, sorting: tuple[Tensor, Tensor], top_k: int) -> Tensor:
    return x.new_zeros(len(sorting[0]), weight.shape[1])


def _gather(x: Tensor, weight: Tensor, sorting: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    _outputs = x.new_zeros(len(x), weight.shape[1])
    return x.new_zeros(len(weights), weight.shape[1])


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x).copy_(x)


def _add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x).copy_(x), torch.empty_like(x).copy_(more)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None):
    return torch.empty_like(x).copy_(grad), torch.zeros_like(weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape).copy_(x)


def _swiglu(both: Tensor) -> Tensor:
    return both.new_empty(len(both), both.shape[1] // 2).copy_(both[:, : both.shape[1] // 2])


def _swiglu_backward(grad: Tensor, both: Tensor) -> Tensor:
    return torch.empty_like(both).zero_()


def _score(logits: Tensor, targets: Tensor, temperature: float):
    return tuple(logits.new_zeros(3, len(logits), dtype=torch.float32))


def _score_backward(logits, targets, grad, needed, temperature, dtype) -> Tensor:
    return torch.zeros(logits.shape, dtype=dtype)


FUNCTIONS = {
    "attention": {"attend": _attend},
    "experts": {"spread": _spread, "gather": _gather},
    "products": {"linear": _linear, "per_head": _per_head},
    "rowwise": {
        "norm": _norm, "add_norm": _add_norm, "norm_backward": _norm_backward, "rotate": _rotate,
        "swiglu": _swiglu, "swiglu_backward": _swiglu_backward,
    },
    "sampling": {"score": _score, "score_backward": _score_backward},
}  # fmt: skip


@cache
def card_ops() -> object:
    """The operations of a card with functions of torch for its kernels; nothing else sees them."""
    package = importlib.import_module("limbeck.model.cuda")
    fakes = {}
    for name in KERNELS:
        fakes[name] = ModuleType(name)
        vars(fakes[name]).update(FUNCTIONS[name])
    names = {f"{package.__name__}.{name}": module for name, module in fakes.items()}
    ops = "limbeck.model.ops.cuda"
    with mock.patch.dict(sys.modules, names), mock.patch.multiple(package, create=True, **fakes):
        sys.modules.pop(ops, None)
        module = importlib.import_module(ops)
    module.torch = _Torch(torch)

    class CountedOps(module.CUDAOps):
        """A card's operations on the CPU."""

        logits_at_once = LOGITS

        def score_backward(self, predictions, grad_R, needed_R, by_head_VC):
            """As on a card; torch's product on a CPU has no result in float32 from 16 bits."""
            if by_head_VC is None or by_head_VC.dtype == predictions.head_VC.dtype:
                return super().score_backward(predictions, grad_R, needed_R, by_head_VC)
            by_hidden_RC = super().score_backward(predictions, grad_R, needed_R, None)
            by_head_VC.add_(torch.zeros_like(by_head_VC))
            return by_hidden_RC

    return CountedOps()


class _Torch:
    """torch, but for the flash attention of a card."""

    def __init__(self, real: ModuleType):
        self.real = real
        self.ops = mock.NonCallableMock()
        self.ops.aten._flash_attention_backward = _flash_backward

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)
