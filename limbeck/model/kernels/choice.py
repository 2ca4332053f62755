"""The choice between kernels and plain torch, operation by operation: the one that was faster on this
machine.

At first use every operation is timed both ways, interleaved, at a few shapes (under five seconds in all), and
the timings are stored beside the library, for this processor, torch and number of threads. As rounding
depends on the choice, a stage records it when it begins (`record`) and goes on with that one after a kill
(`adopt`).

B rows · C inputs · V outputs.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import statistics
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from . import trials
from .build import folder, found, instructions, library
from .operations import WAYS
from .trials import MOST, OPERATIONS, WEIGHTS, WIDEST, Work

TURNS = 7  # turns of each side
WAY_TURNS = 5  # turns of each way of multiplying
FEW_TURNS = 3  # turns of each side where one takes long
BUDGET = 4.0  # seconds of measuring, after which two turns of each side must do
LEAST = 1e-3  # seconds of one turn, by repetition
LONG = 0.05  # seconds of a turn from which a few will do
BUSY = 1.5  # times the least: a median of more shows that other programs ran, and is not used
TIE = 1.0  # times torch's seconds that ours may take
LAYER_TIE = 0.87  # the same of layers: looking up the choice costs time, too
# Environment variables that slow torch down, for measuring.
SPEED = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True)
class Timing:
    """One operation at one shape: seconds of ours and of torch's, and the used one.

    `used` is `torch`, `ours`, or our way of multiplying.
    """

    operation: str
    shape: str
    ours: float
    torch: float
    used: str


@dataclass
class Choice:
    """The operations that the kernels do, by classes of size.

    `used[operation]` has a flag for each class, in order of size; `used["product"]` has them by the values of
    a weight and then by rows. `ways`, in the same order, are the ways in which the kernels multiply, as
    indices into `WAYS`.
    """

    used: dict[str, list[bool]]
    ways: list[int]

    @classmethod
    def all(cls, kernels: bool) -> Choice:
        """The kernels everywhere, or nowhere."""
        products = len(WIDEST) * len(MOST)
        used = {"product": [kernels] * products}
        for name, operation in OPERATIONS.items():
            used[name] = [kernels] * len(operation.largest)
        return cls(used, [0] * products)

    def serves(self, operation: str, size: float) -> bool:
        """True if the kernels do an operation of this size."""
        for largest, used in zip(OPERATIONS[operation].largest, self.used[operation], strict=True):
            if size <= largest:
                return used
        return False

    def serves_product(self, rows: int, numbers: int) -> bool:
        """True if the kernels multiply so many rows, at most 128, with a weight of so many values."""
        widest = bisect_left(WIDEST, numbers)
        return self.used["product"][widest * len(MOST) + bisect_left(MOST, rows)]


_lock = threading.RLock()
_choices: dict[int, Choice] = {}  # by threads
_timings: dict[int, list[Timing]] = {}  # by threads
_forced: dict[str, bool] = {}  # by operation
_in_library: Choice | None = None  # the choice whose ways the library has


def takes(*tensors: Tensor) -> bool:
    """True if there are kernels and they can compute on these tensors [...]."""
    for tensor in tensors:  # a plain loop, as this precedes every operation
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return library() is not None


def serves(operation: str, size: float, *tensors: Tensor) -> bool:
    """True if the kernels shall do an operation on these tensors [...].

    The meaning of `size` is that of the operation in `OPERATIONS`.
    """
    if not takes(*tensors):
        return False
    chosen = current()
    return _forced[operation] if operation in _forced else chosen.serves(operation, size)


def serves_product(x_BC: Tensor, weight_VC: Tensor) -> bool:
    """True if the kernels shall multiply these, without a gradient."""
    rows = x_BC.shape[0]
    if rows > MOST[-1] or not takes(x_BC, weight_VC):
        return False
    chosen = current()
    return _forced["product"] if "product" in _forced else chosen.serves_product(rows, weight_VC.numel())


@contextmanager
def forced(operation: str, ours: bool) -> Iterator[None]:
    """Do an operation with the kernels, or with torch, whatever was chosen: to measure it."""
    before = dict(_forced)
    _forced[operation] = ours
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def current() -> Choice:
    """The choice for the present number of torch's threads; measured, or read from the disk, at first use."""
    global _in_library
    threads = torch.get_num_threads()
    chosen = _choices.get(threads)
    if chosen is None:
        with _lock:
            chosen = _choices.get(threads) or _find(threads)
    if chosen is not _in_library:
        _in_library = chosen
        library().use_ways((ctypes.c_int8 * len(chosen.ways))(*chosen.ways))
    return chosen


def timings() -> list[Timing]:
    """All timings for the present number of torch's threads; none without kernels."""
    if library() is None:
        return []
    current()
    return _timings.get(torch.get_num_threads(), [])


def forget() -> None:
    """Drop the stored choice, so that everything is timed anew: the machine was busy, or has changed."""
    with _lock:
        _choices.clear()
        if library() is not None:
            _path(torch.get_num_threads()).unlink(missing_ok=True)


# ---------------------------------------------------------------- in a stage


def record() -> dict[str, Any]:
    """The choice, for a stage's manifest."""
    kernels = _kernels()
    if library() is None:
        return kernels
    return {**kernels, **asdict(current())}


def adopt(recorded: dict[str, Any] | None) -> str:
    """Take the choice that a stage recorded when it began; None: this machine's own.

    Returns the reason why the recorded choice cannot be taken, or an empty text.
    """
    threads = torch.get_num_threads()
    with _lock:
        _choices.pop(threads, None)
        if recorded is None:
            return ""
        available = library() is not None
        if available and recorded["instructions"] == "none":
            _choices[threads] = Choice.all(False)
            return ""
        here = _kernels()
        if any(recorded.get(key) != here.get(key) for key in ("instructions", "library")):
            return (
                f"it began with other kernels ({_describe(recorded)}; here {_describe(here)}): "
                "it goes on, and its bytes will differ"
            )
        if available:
            _choices[threads] = Choice(recorded["used"], recorded["ways"])
        return ""


def _kernels() -> dict[str, str]:
    """The kernels of this machine."""
    if library() is None:
        return {"instructions": "none"}
    return {"instructions": instructions(), "library": Path(found()[1]).stem}


def _describe(kernels: dict[str, Any]) -> str:
    """Kernels in words."""
    return f"{kernels['instructions']}, {kernels['library']}" if "library" in kernels else "none"


# ---------------------------------------------------------------- on the disk


def _find(threads: int) -> Choice:
    """The stored choice for this machine and so many threads, measured if there is none yet.

    One process measures while others wait for it; where nothing can be stored, each one measures.
    """
    path = _path(threads)
    try:
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _store(path, _measure(threads), _choices[threads])
            stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        _timings[threads] = _measure(threads)
        return _choices[threads]
    _timings[threads] = [Timing(**row) for row in stored["timings"]]
    _choices[threads] = Choice(stored["used"], stored["ways"])
    return _choices[threads]


def _store(path: Path, timings: list[Timing], chosen: Choice) -> None:
    """Write a choice and its timings."""
    rows = [asdict(timing) for timing in timings]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**asdict(chosen), "timings": rows}), encoding="utf-8")
    partial.replace(path)


def _path(threads: int) -> Path:
    """The file of the choice, whose name covers all that timings depend on."""
    sources = [Path(module).read_text(encoding="utf-8") for module in (__file__, trials.__file__)]
    speed = [os.environ.get(name) for name in SPEED]
    key = (found()[1], torch.__version__, torch.backends.cpu.get_cpu_capability(), *speed, *sources)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return folder() / f"choice-{digest}-{threads}.json"


# ---------------------------------------------------------------- measuring


def _measure(threads: int) -> list[Timing]:
    """Time every operation; the results of the first ones are in use when the later ones are timed."""
    chosen = Choice.all(True)
    _choices[threads] = chosen
    late = time.perf_counter() + BUDGET
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        with torch.no_grad():
            rows = [_time_products(chosen, weight, rows) for weight in WEIGHTS for rows in MOST]
        for name, operation in OPERATIONS.items():
            for i, (shape, make) in enumerate(operation.trials):
                turns = TURNS if time.perf_counter() < late else 2
                timing = _time(name, shape, make(), turns=turns)
                chosen.used[name][i] = timing.used != "torch"
                rows.append(timing)
    trials.release()
    return rows


def _time(name: str, shape: str, work: Work, tie: float = TIE, turns: int = TURNS) -> Timing:
    """Time one piece of work both ways; ours is used if it takes at most `tie` times torch's seconds."""
    ours, plain = interleaved(work, work, turns=turns, forcing=(name, (True, False)))
    return Timing(name, shape, ours, plain, "ours" if ours <= tie * plain else "torch")


def _time_products(chosen: Choice, weight: tuple[int, int], rows: int) -> Timing:
    """Time one class of products, and set its way and its use in `chosen`.

    The kernels multiply in their fastest way; they do so in a layer if its module is then faster than
    torch's.
    """
    global _in_library
    columns, inner = weight
    ways = [way for way, name in enumerate(WAYS) if name != "dots" or rows <= 16]
    seconds = interleaved(*trials.products(rows, columns, inner, ways), turns=WAY_TURNS)
    best = ways[seconds.index(min(seconds))]
    place = WEIGHTS.index(weight) * len(MOST) + MOST.index(rows)
    chosen.ways[place] = best
    _in_library = None  # has to be told the new way
    shape = f"{rows} x {inner}, weight {columns} x {inner}"
    timing = _time("product", shape, trials.layer(rows, columns, inner), LAYER_TIE)
    used = best > 0 and timing.used == "ours"
    chosen.used["product"][place] = used
    return replace(timing, used=WAYS[best] if used else "torch")


def interleaved(
    *sides: Work, turns: int = TURNS, forcing: tuple[str, Sequence[bool]] | None = None
) -> list[float]:
    """Seconds of each side, measured in turns of at least a millisecond each.

    The median of the turns, or the least on a busy machine, where turns differ by half. `forcing` names an
    operation and, for each side, whether the kernels do it.
    """
    operation, ours = forcing or ("", [False] * len(sides))
    pairs = list(zip(sides, ours, strict=True))

    def turn(number: int, repeats: int) -> float:
        """Seconds of one side, as a mean of several repetitions."""
        side, by_kernels = pairs[number]
        with forced(operation, by_kernels):
            begin = time.perf_counter()
            for _ in range(repeats):
                side()
            return (time.perf_counter() - begin) / repeats

    order = list(range(len(sides)))
    for number in order:
        turn(number, 1)  # to warm up
    once = statistics.mean(turn(number, 1) for number in order)
    repeats = max(1, math.ceil(LEAST / max(once, 1e-9)))
    spent: list[list[float]] = [[] for _ in sides]
    for _ in range(turns if once < LONG else FEW_TURNS):
        for number in order:
            spent[number].append(turn(number, repeats))
        order.reverse()  # the second side finds in the processor's caches what the first has read
    medians = [statistics.median(seconds) for seconds in spent]
    least = [min(seconds) for seconds in spent]
    busy = any(median > BUSY * low for median, low in zip(medians, least, strict=True))
    return least if busy else medians
