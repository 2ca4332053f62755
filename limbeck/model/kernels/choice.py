"""Which operations the kernels do, and which plain torch: whichever was faster on this machine.

At first use every operation is timed both ways, interleaved, at a few shapes (under five seconds in all), and what was
found is kept beside the library, for this processor, torch and number of threads. As rounding depends on it, a stage
writes its choice down when it begins (`record`) and goes on with that one after a kill (`adopt`).
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

TURNS, WAY_TURNS = 7, 5  # of each side; three where one takes long
BUDGET = 4.0  # seconds of measuring, after which two turns of each side must do
LEAST = 1e-3  # seconds of one turn, by repetition
LONG = 0.05  # seconds of a turn from which three will do
BUSY = 1.5  # a median that is so many times the least: others were at work, and medians say little
TIE, LAYER_TIE = (
    1.0,
    0.87,
)  # ours must take at most so many times torch's seconds; of layers less: asking which costs, too
SPEED = (
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
)  # what slows torch down, for measuring


@dataclass(frozen=True)
class Timing:
    """One operation at one shape: seconds of ours and of torch's, and which is used (`torch`, or how ours does it)."""

    operation: str
    shape: str
    ours: float
    torch: float
    used: str


@dataclass
class Choice:
    """`used[operation]`: for each of its classes, in order of size, whether the kernels do it; `used["product"]` has them
    by the numbers of a weight and then by rows. `ways`, in the same order: how kernels multiply, an index into `WAYS`."""

    used: dict[str, list[bool]]
    ways: list[int]

    @classmethod
    def all(cls, kernels: bool) -> Choice:
        """The kernels everywhere, or nowhere."""
        used = {name: [kernels] * len(operation.largest) for name, operation in OPERATIONS.items()}
        products = len(WIDEST) * len(MOST)
        return cls({"product": [kernels] * products, **used}, [0] * products)

    def serves(self, operation: str, size: float) -> bool:
        for largest, used in zip(OPERATIONS[operation].largest, self.used[operation], strict=True):
            if size <= largest:
                return used
        return False

    def serves_product(self, rows: int, numbers: int) -> bool:
        """The same for a product of so many rows, at most 128, with a weight of so many numbers."""
        widest = bisect_left(WIDEST, numbers)
        return self.used["product"][widest * len(MOST) + bisect_left(MOST, rows)]


_lock = threading.RLock()
_choices: dict[int, Choice] = {}  # by threads
_timings: dict[int, list[Timing]] = {}
_forced: dict[str, bool] = {}
_in_library: Choice | None = None  # whose ways the library has


def takes(*tensors: Tensor) -> bool:
    """Whether there are kernels, and they can compute on these tensors."""
    for tensor in tensors:  # written out, as it is asked before every operation
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return library() is not None


def serves(operation: str, size: float, *tensors: Tensor) -> bool:
    """Whether the kernels shall do an operation of this size (what it is, `OPERATIONS` says) on these tensors."""
    if not takes(*tensors):
        return False
    chosen = current()
    return _forced[operation] if operation in _forced else chosen.serves(operation, size)


def serves_product(x_BC: Tensor, weight_VC: Tensor) -> bool:
    """Whether the kernels shall multiply these, where no gradient is asked for."""
    rows = x_BC.shape[0]
    if rows > MOST[-1] or not takes(x_BC, weight_VC):
        return False
    chosen = current()
    return _forced["product"] if "product" in _forced else chosen.serves_product(rows, weight_VC.numel())


@contextmanager
def forced(operation: str, ours: bool) -> Iterator[None]:
    """Do an operation our way, or torch's, whatever was chosen: to measure it."""
    before = dict(_forced)
    _forced[operation] = ours
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def current() -> Choice:
    """What is used with as many threads as torch has now; found out, or read from the disk, when first asked for."""
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
    """What was measured, with as many threads as torch has now; nothing where there are no kernels."""
    if library() is None:
        return []
    current()
    return _timings.get(torch.get_num_threads(), [])


def forget() -> None:
    """Time everything anew, when next it is asked for: the machine was busy, or has changed."""
    with _lock:
        _choices.clear()
        if library() is not None:
            _kept(torch.get_num_threads()).unlink(missing_ok=True)


# ---------------------------------------------------------------- in a stage


def record() -> dict[str, Any]:
    """The choice as a stage's manifest has it."""
    if library() is None:
        return {"instructions": "none"}
    return {"instructions": instructions(), "library": Path(found()[1]).stem, **asdict(current())}


def adopt(recorded: dict[str, Any] | None) -> str:
    """Compute as a stage did when it began; None: as this machine would. Returns why that cannot be had, or nothing."""
    with _lock:
        _choices.pop(threads := torch.get_num_threads(), None)
        if recorded is None:
            return ""
        here = (
            {"instructions": "none"}
            if library() is None
            else {"instructions": instructions(), "library": Path(found()[1]).stem}
        )
        if library() is not None and recorded["instructions"] == "none":
            _choices[threads] = Choice.all(False)
        elif any(recorded.get(key) != here.get(key) for key in ("instructions", "library")):
            return f"it began with other kernels ({_named(recorded)}; here {_named(here)}): it goes on, and its bytes will differ"
        elif library() is not None:
            _choices[threads] = Choice(recorded["used"], recorded["ways"])
        return ""


def _named(choice: dict[str, Any]) -> str:
    return f"{choice['instructions']}, {choice['library']}" if "library" in choice else "none"


# ---------------------------------------------------------------- measuring


def _find(threads: int) -> Choice:
    """The choice that is kept for this machine and so many threads, measured if there is none yet. One process measures,
    others wait for it; where nothing can be kept, each does."""
    path = _kept(threads)
    try:
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _keep(path, _measure(threads), _choices[threads])
            kept = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        _timings[threads] = _measure(threads)
        return _choices[threads]
    _timings[threads] = [Timing(**row) for row in kept["timings"]]
    _choices[threads] = Choice(kept["used"], kept["ways"])
    return _choices[threads]


def _keep(path: Path, timings: list[Timing], chosen: Choice) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(
        json.dumps({**asdict(chosen), "timings": [asdict(timing) for timing in timings]}), encoding="utf-8"
    )
    partial.replace(path)


def _kept(threads: int) -> Path:
    told = (
        found()[1],
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        *(os.environ.get(name) for name in SPEED),
        *(Path(module).read_text(encoding="utf-8") for module in (__file__, trials.__file__)),
    )
    return folder() / f"choice-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}-{threads}.json"


def _measure(threads: int) -> list[Timing]:
    """Time every operation; what was found of the first is in use when the later ones are timed."""
    chosen = _choices[threads] = Choice.all(True)
    late = time.perf_counter() + BUDGET
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        with torch.no_grad():
            found = [_time_products(chosen, weight, rows) for weight in WEIGHTS for rows in MOST]
        for name, operation in OPERATIONS.items():
            for i, (shape, make) in enumerate(operation.trials):
                found.append(_time(name, shape, make(), turns=TURNS if time.perf_counter() < late else 2))
                chosen.used[name][i] = found[-1].used != "torch"
    trials.release()
    return found


def _time(name: str, shape: str, work: Work, tie: float = TIE, turns: int = TURNS) -> Timing:
    ours, plain = interleaved(work, work, turns=turns, forcing=(name, (True, False)))
    return Timing(name, shape, ours, plain, "ours" if ours <= tie * plain else "torch")


def _time_products(chosen: Choice, weight: tuple[int, int], rows: int) -> Timing:
    """The fastest way is taken inside the kernels; a layer's product is ours where its module is faster so."""
    global _in_library
    ways = [way for way in range(len(WAYS)) if WAYS[way] != "dots" or rows <= 16]
    taken = interleaved(*trials.products(rows, *weight, ways), turns=WAY_TURNS)
    best = ways[min(range(len(ways)), key=taken.__getitem__)]
    place = WEIGHTS.index(weight) * len(MOST) + MOST.index(rows)
    chosen.ways[place], _in_library = best, None
    columns, inner = weight
    timing = _time(
        "product", f"{rows} x {inner}, weight {columns} x {inner}", trials.layer(rows, *weight), LAYER_TIE
    )
    used = best > 0 and timing.used == "ours"
    chosen.used["product"][place] = used
    return replace(timing, used=WAYS[best] if used else "torch")


def interleaved(
    *sides: Work, turns: int = TURNS, forcing: tuple[str, Sequence[bool]] | None = None
) -> list[float]:
    """Seconds of each side, in turns of at least a millisecond each: the median, or on a busy machine, where turns differ
    by half, the least. `forcing` names an operation, and for each side whether the kernels do it."""
    operation, wishes = forcing or ("", [False] * len(sides))

    def turn(side: Work, wish: bool, repeats: int) -> float:
        with forced(operation, wish):
            begin = time.perf_counter()
            for _ in range(repeats):
                side()
            return (time.perf_counter() - begin) / repeats

    both = list(enumerate(zip(sides, wishes, strict=True)))
    for _, (side, wish) in both:
        turn(side, wish, 1)
    once = statistics.mean(turn(side, wish, 1) for _, (side, wish) in both)
    repeats = max(1, math.ceil(LEAST / max(once, 1e-9)))
    spent: list[list[float]] = [[] for _ in sides]
    for i in range(turns if once < LONG else 3):
        for number, (side, wish) in (
            reversed(both) if i % 2 else both
        ):  # whoever is second finds what the first has read
            spent[number].append(turn(side, wish, repeats))
    busy = any(statistics.median(seconds) > BUSY * min(seconds) for seconds in spent)
    return [min(seconds) if busy else statistics.median(seconds) for seconds in spent]
