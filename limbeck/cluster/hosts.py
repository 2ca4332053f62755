"""Where seats are: `Hosts` starts them and carries messages, `Local` with processes on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from ..model import weights
from ..model.decoder import Decoder
from ..text.tokenizer import Tokenizer

MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
SPARE = 2  # times the bytes of the weights that it must have free


class Event(NamedTuple):
    """What happened at a seat: a message arrived or, without one, the seat died; `end` says how."""

    seat: int
    message: bytes | None
    end: str = ""


class Hosts(Protocol):
    """Places for seats, which are numbered from 0. Seats keep no state that a stage needs."""

    def start(self, seat: int) -> None:
        """Start a seat. It sends a message when it is ready."""

    def send(self, seat: int, message: bytes) -> None:
        """Send a message to a seat, without waiting. Nothing happens if it is dead."""

    def wait(self, seconds: float) -> Event | None:
        """Return the next event of a seat, or None if there is none within `seconds`."""

    def kill(self, seat: int) -> None:
        """Kill a seat; its death is an event."""

    def publish(self, model: Decoder, tokenizer: Tokenizer) -> str:
        """Store the weights of a model where the seats can read them; return the folder's path there."""

    def withdraw(self, folder: str) -> None:
        """Delete weights that were published."""

    def close(self) -> None:
        """End all seats."""


@dataclass
class _Process:
    """A seat's process, and what is to be sent to it. None ends the sending."""

    process: subprocess.Popen
    connection: Connection
    outgoing: SimpleQueue[bytes | None] = field(default_factory=SimpleQueue)


class Local:
    """Seats that are processes on this machine, of `threads` threads each."""

    def __init__(self, threads: int = 1):
        self.threads = threads
        self._seats: dict[int, _Process] = {}
        self._events: SimpleQueue[tuple[_Process, Event]] = SimpleQueue()
        self._folder: Path | None = None
        self._versions = count()

    def start(self, seat: int) -> None:
        """Start the process of a seat."""
        ours, theirs = Pipe()
        folder = self._weights_folder()
        command = [sys.executable, "-m", "limbeck.cluster.seat"]
        command += [str(theirs.fileno()), str(self.threads), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONHASHSEED": "0"}
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what libraries print is no result of the stage's
            pass_fds=[theirs.fileno()],
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        started = _Process(process, ours)
        self._seats[seat] = started
        for work in (self._listen, self._talk):
            threading.Thread(target=work, args=(seat, started), daemon=True).start()

    def send(self, seat: int, message: bytes) -> None:
        """Send a message to a seat, on a thread of its own: a seat that is stopped does not read."""
        self._seats[seat].outgoing.put(message)

    def wait(self, seconds: float) -> Event | None:
        """Return the next event of a seat. Those of processes that were replaced are dropped."""
        with suppress(Empty):
            process, event = self._events.get(timeout=seconds) if seconds else self._events.get_nowait()
            if self._seats.get(event.seat) is process:
                return event
        return None

    def kill(self, seat: int) -> None:
        """Kill the process of a seat, also one that is stopped."""
        self._seats[seat].process.kill()

    def publish(self, model: Decoder, tokenizer: Tokenizer) -> str:
        """Write a model's weights and tokenizer into a new folder in memory, if there is room, else among
        temporary files."""
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        folder = self._weights_folder(size) / f"{next(self._versions)}"
        folder.mkdir()
        weights.save(model, folder, tokenizer)
        return str(folder)

    def withdraw(self, folder: str) -> None:
        """Delete a folder of weights."""
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Kill all seats, wait until they have ended, and delete the weights."""
        for seat in self._seats.values():
            seat.outgoing.put(None)
            seat.process.kill()
        for seat in self._seats.values():
            seat.process.wait()
        self._seats.clear()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _weights_folder(self, size: int = 0) -> Path:
        """Return the folder of all weights. It is chosen once, for weights of `size` bytes; the seats delete
        it when this process dies."""
        if self._folder is None:
            room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > SPARE * size
            self._folder = Path(tempfile.mkdtemp(prefix="limbeck-weights-", dir=MEMORY if room else None))
        return self._folder

    def _listen(self, seat: int, started: _Process) -> None:
        """Put each message of a seat into the queue, and its death."""
        with suppress(EOFError, OSError):
            while True:
                self._events.put((started, Event(seat, started.connection.recv_bytes())))
        status = started.process.wait()
        started.outgoing.put(None)
        end = f"was killed (signal {-status})" if status < 0 else f"ended with code {status}"
        self._events.put((started, Event(seat, None, end)))

    @staticmethod
    def _talk(seat: int, started: _Process) -> None:
        """Send a seat its messages until there are no more, or it is dead."""
        with suppress(OSError):
            while (message := started.outgoing.get()) is not None:
                started.connection.send_bytes(message)
