"""Numbers and promises of the parts, and how times are taken."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

RESULTS: dict[str, list[dict]] = {}


def note(part: str, **numbers: object) -> None:
    """Print one line of numbers and keep it for the JSON file."""
    RESULTS.setdefault(part, []).append(numbers)
    words = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in numbers.items())
    print(f"[{part}]", *words, flush=True)


def promise(part: str, what: str, kept: bool) -> None:
    """Print whether a promise is kept, and keep it."""
    note(part, promise=what, kept=bool(kept))


def broken() -> list[str]:
    """Return the promises that were not kept."""
    return [
        f"{part}: {line['promise']}"
        for part, lines in RESULTS.items()
        for line in lines
        if line.get("kept") is False
    ]


def free_memory() -> None:
    """Give back what the last part used."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.use_deterministic_algorithms(False)


def peak() -> float:
    """Return the most memory that torch has allocated since `free_memory`, in GiB."""
    return torch.cuda.max_memory_allocated() / 2**30


def microseconds(call: Callable[[], object], repeats: int = 10, calls: int = 10) -> float:
    """Return the median time of `call` on the card in microseconds, from replays of a graph of calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
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


def seconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Return the median time of `call` in seconds."""
    call()
    times = []
    for _ in range(repeats):
        times.append(once(call))
    return sorted(times)[len(times) // 2]


def once(call: Callable[[], object]) -> float:
    """Return the time of one `call` in seconds."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
