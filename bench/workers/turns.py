"""A worker's side of bench/sides.py, with the standard library alone: it runs in every environment."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator

SETTINGS = json.loads(sys.stdin.readline())
_out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever prints goes to the log


def say(**numbers: float) -> None:
    """Write one line of measurements."""
    _out.write(json.dumps(numbers) + "\n")
    _out.flush()


def wait() -> None:
    """Until it is this side's turn; the end of the input ends the worker."""
    if not sys.stdin.readline():
        os._exit(0)


def gflops(torch, size: int = 1536) -> float:
    """What a large square product reaches on this machine, now."""
    a, times = torch.randn(size, size), []
    for _ in range(4):
        clock = Clock()
        a @ a
        times.append(clock.elapsed())
    return 2 * size**3 / min(times) / 1e9


class Clock:
    """Seconds since it was wound up, of the wall and of the processor."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def elapsed(self) -> float:
        """Seconds of wall time since the turn began."""
        return time.perf_counter() - self.wall

    def cpu_elapsed(self) -> float:
        """Seconds of processor time since the turn began."""
        return time.process_time() - self.cpu

    def say(self, **more: float) -> None:
        """Write the turn's times, its peak memory and `more`."""
        say(wall=self.elapsed(), cpu=self.cpu_elapsed(), **more, peak_mib=peak())


def peak() -> float:
    """MiB of memory this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def turns() -> Iterator[Clock]:
    """A clock for each turn, once the worker says that it is ready."""
    say(ready=1)
    while True:
        wait()
        yield Clock()


def tell(torch, rollout, rows: int) -> None:
    """Report a turn of two rollouts: of one token, then of all tokens.

    Decoding is the difference of their times. Its share is that of a large product's FLOPs, measured before
    and after, as the machine's speed varies.
    """
    roof, clock = gflops(torch), Clock()
    first = rollout(1)
    whole = rollout(SETTINGS["new"])
    cpu, roof = clock.cpu_elapsed(), (roof + gflops(torch)) / 2
    decode = rows * (SETTINGS["new"] - 1) / (whole - first)
    share = decode * SETTINGS["gflop"] / roof
    say(
        wall=whole,
        cpu=cpu,
        tokens_per_second=rows * SETTINGS["new"] / whole,
        decode=decode,
        roof=roof,
        share=share,
        peak_mib=peak(),
    )
