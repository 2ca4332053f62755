"""The lock of a card: one process at a time computes on it, since each takes most of its memory.

A lock is a file `card-NAME.lock` in a folder that all processes of the user share. It holds who has it, for
those that wait; the operating system frees it when the process dies.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..model.kernels.build import folder as cache_folder
from ..model.ops import devices
from ..types import Resumable

INTERVAL = 0.5  # seconds between two attempts


@contextmanager
def device_lock(
    device: str, owner: str, tell: Callable[[str], None], stopping: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Hold a device, by its resolved name, made ready for use: a card with its lock, any other as it is.

    The other arguments are those of `card_lock`. At the end the card's memory is given back, unless an error
    left this process unable to use it.
    """
    if not devices.is_card(device):
        yield
        return
    with card_lock(cache_folder(), devices.identity(device), owner, tell, stopping):
        devices.prepare(device)
        usable = True
        try:
            yield
        except BaseException as error:
            usable = not devices.poisoned(error)
            raise
        finally:
            if usable:
                devices.release()


@contextmanager
def card_lock(
    folder: Path, card: str, owner: str, tell: Callable[[str], None], stopping: Callable[[], bool]
) -> Iterator[None]:
    """Hold the lock of a card; wait for it while another process has it, and tell once for whom.

    `card` is the card's identity and `owner` who takes it, for those that wait. `tell` takes a message for
    the user. Raises Resumable if `stopping` returns True while waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"card-{re.sub(r'[^A-Za-z0-9-]', '-', card)}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while not _taken(descriptor):
            if stopping():
                raise Resumable("stopped while it waited for the card; the same command goes on from here")
            if not told:
                tell(f"waits for the card, which {_owner(path)} uses")
                told = True
            time.sleep(INTERVAL)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{owner} (process {os.getpid()})".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    """Try to take the lock; return True if it was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(path: Path) -> str:
    """Return who has the lock, in words."""
    return path.read_text(encoding="utf-8") or "another process"
