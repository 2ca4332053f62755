"""A worker's side of bench/sides.py. Imports nothing but the standard library: it runs in every environment."""

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
    _out.write(json.dumps(numbers) + "\n")
    _out.flush()


def wait() -> None:
    """Until it is this side's turn; the end of the input ends the worker."""
    if not sys.stdin.readline():
        os._exit(0)


class Clock:
    """Seconds since it was wound up, of the wall and of the processor."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def elapsed(self) -> float:
        return time.perf_counter() - self.wall

    def say(self, **more: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        say(wall=time.perf_counter() - self.wall, cpu=time.process_time() - self.cpu, **more, peak_mib=peak)


def turns() -> Iterator[Clock]:
    """A clock for each turn, once the worker says that it is ready."""
    say(ready=1)
    while True:
        wait()
        yield Clock()
