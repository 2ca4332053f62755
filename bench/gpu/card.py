"""What the parts ask of an NVIDIA card, and its stand-in in a rehearsal: the CPU, with `plain` operations.

Graphs, events, peaks of memory and Triton are here and nowhere else. A rehearsal runs every part at tiny
sizes, so that a mistake in a part costs no time of a card; its times and its bits mean nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.model import ops
from limbeck.model.context import Layer
from limbeck.model.ops.table import Pool, Rows


class Card:
    """The first NVIDIA card. `name` is the device as commands call it, `device` where its tensors lie."""

    name = "cuda"
    device = "cuda"
    dtype = torch.bfloat16
    rehearsed = False

    def size(self, real: Any, tiny: Any) -> Any:
        """Return how much a part does: `real` on a card, `tiny` in a rehearsal."""
        return real

    def place(self, model: nn.Module, exact: bool = True, dtype: torch.dtype | None = None) -> nn.Module:
        """Move a model to the card, with exact operations or the libraries' own, and with weights of `dtype`
        (None: as they are)."""
        return ops.place(model, self.name, dtype, exact)

    @cached_property
    def kernels(self) -> SimpleNamespace:
        """The kernels that are measured by themselves."""
        from limbeck.model.cuda import attention, products, sampling

        return SimpleNamespace(
            linear=products.linear,
            tile=products.Tile,
            attend=attention.attend,
            attend_one=attention.attend_one,
            draw=sampling.draw,
            logprob=sampling.logprob,
        )

    def describe(self) -> dict[str, Any]:
        """Return the card's name and the versions of what computes."""
        return ops.devices.describe("cuda:0")

    # ------------------------------------------------------------ memory

    def free(self) -> None:
        """Give back what the last part used, and count peaks from now on."""
        gc.collect()
        torch.use_deterministic_algorithms(False)
        self._free()

    def _free(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Return the most memory that torch has allocated since `free`, in GiB."""
        return torch.cuda.max_memory_allocated() / 2**30

    def deterministic(self) -> None:
        """Let torch take only operations that give the same bits each time."""
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Raise RuntimeError where the host waits for the card."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    # ------------------------------------------------------------ times

    def wait(self) -> None:
        """Wait until the card has done all its work."""
        torch.cuda.synchronize()

    def once(self, call: Callable[[], object]) -> float:
        """Return the time of one `call` in seconds."""
        self.wait()
        begin = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begin

    def seconds(self, call: Callable[[], object], repeats: int = 10) -> float:
        """Return the median time of `call` in seconds."""
        call()
        times = sorted(self.once(call) for _ in range(repeats))
        return times[len(times) // 2]

    def microseconds(self, call: Callable[[], object], repeats: int = 10, calls: int = 10) -> float:
        """Return the median time of `call` on the card in microseconds, from replays of a graph of calls."""
        for _ in range(3):
            call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        times = []
        for _ in range(repeats):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / calls)
        return sorted(times)[len(times) // 2]


class Rehearsal(Card):
    """The CPU in the place of a card: `plain` operations in float32, and no graph."""

    name = "plain"
    device = "cpu"
    dtype = torch.float32
    rehearsed = True

    def size(self, real: Any, tiny: Any) -> Any:
        """Return `tiny`."""
        return tiny

    @cached_property
    def kernels(self) -> SimpleNamespace:
        """The kernels' functions by `plain` operations, which have no tiles."""
        plain = ops.PlainOps()

        def linear(x: Tensor, weight: Tensor, tile: object = None, beside: bool | None = None) -> Tensor:
            return plain.linear(x, weight)

        def attend(
            q: Tensor, pool: Pool, rows: Rows, scale: float, window: int = 0, tile: int = 0
        ) -> tuple[Tensor, None]:
            return plain.attend_rows(Layer(0, scale, window), q, pool, rows), None

        def attend_one(
            q: Tensor, pool: Pool, table: Tensor, lengths: Tensor, scale: float, window: int = 0
        ) -> Tensor:
            return plain.attend_one(Layer(0, scale, window), q, pool, table, lengths)

        return SimpleNamespace(
            linear=linear,
            tile=lambda *sizes: sizes,
            attend=attend,
            attend_one=attend_one,
            draw=plain.draw,
            logprob=plain.logprob,
        )

    def describe(self) -> dict[str, Any]:
        """Return that it is a rehearsal."""
        return {"name": "rehearsal on the CPU", "torch": torch.__version__}

    def _free(self) -> None:
        """A CPU keeps no peaks."""

    def peak(self) -> float:
        """Return 0: a CPU keeps no peaks."""
        return 0.0

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Let everything pass: a CPU waits for nothing."""
        yield

    def wait(self) -> None:
        """Return at once."""

    def seconds(self, call: Callable[[], object], repeats: int = 10) -> float:
        """Return the time of one `call`."""
        return self.once(call)

    def microseconds(self, call: Callable[[], object], repeats: int = 10, calls: int = 10) -> float:
        """Return the time of one `call` in microseconds."""
        return self.once(call) * 1e6
