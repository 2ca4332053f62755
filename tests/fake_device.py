"""A device that is not the CPU, on a machine that has none: its tensors compute on the CPU, but no operation
takes them together with tensors of the CPU, and numpy does not see them, as it would be with a card.

`with fake_device(): model.to(NAME)` makes tensors of the fake device. Inside, tensors that are made for NAME
are of it too. NAME is one that torch knows without further libraries. What a card allows is allowed: tensors
of no dimensions and indices may be on the CPU.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "meta"
COPIES = {
    "_to_copy",
    "copy_",
    "_foreach_copy_",
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
}


class FakeTensor(torch.Tensor):
    """A tensor of the fake device around one of the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    def data_ptr(self):
        return self.inner.data_ptr()

    def __repr__(self):
        return f"fake({self.inner})"

    def __reduce_ex__(self, protocol):
        raise AssertionError("stored without a copy on the CPU")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sees all operations, those that make tensors included."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Data(TorchFunctionMode):
    """Makes tensors of lists and lists of tensors, which torch does not do through the other mode."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.tolist and isinstance(args[0], FakeTensor):
            return args[0].inner.tolist()
        if function not in (torch.tensor, torch.as_tensor):
            return function(*args, **kwargs)
        device = kwargs.pop("device", None)
        made = function(*args, **kwargs)
        return made if device is None else made.to(device)


def run(function, args, kwargs):
    """Carry an operation out on the CPU and wrap its results, unless it mixes devices."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
    name = function.overloadpacket.__name__
    if fakes and name not in COPIES:
        strangers = [t for t in tensors if not isinstance(t, FakeTensor) and t.ndim]
        assert not strangers, f"{name} takes tensors of the CPU {[tuple(t.shape) for t in strangers]} as well"
    wrapped = {id(fake.inner): fake for fake in fakes}
    asked = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    leaves = [_on_cpu(leaf) for leaf in leaves]
    args, kwargs = tree_unflatten(leaves, spec)
    result = function(*args, **kwargs)
    on_fake = bool(fakes) if asked is None else asked.type == NAME
    if name in ("copy_", "index_put_", "_index_put_impl_"):
        on_fake = id(args[0]) in wrapped

    def wrap(value):
        if not isinstance(value, torch.Tensor) or not on_fake:
            return value
        return wrapped[id(value)] if id(value) in wrapped else FakeTensor(value)

    return tree_map(wrap, result)


def _on_cpu(leaf):
    """What the CPU is given in the place of an argument."""
    if isinstance(leaf, FakeTensor):
        return leaf.inner
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf


@contextmanager
def fake_device():
    """The fake device in place of NAME, with which modules keep their parameters' identity."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with (
            Mode(),
            Data(),
            mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: [NAME]),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
