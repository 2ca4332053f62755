"""A sandbox for judges that could hang, crash, escape or exhaust memory: each verdict comes from a process of
its own.

This module is the parent's end of a pipe, `sandbox_worker.py` the child's. The child loads the judges and
never looks at an answer: for each it forks a process that confines itself, judges this one answer, returns
the verdict as its exit code, and leaves nothing behind. The pipe carries JSON of our own, and the answer as
bytes.

Two clocks are set before the answer is read: the first counts the process's own time, so that a busy machine
changes no verdict, the second wall time. If both fail, the parent stops waiting and kills the child.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .confinement import Proof

START_TIMEOUT = 60.0  # seconds of wall time to start Python, or to import a judge
WALL_FACTOR = 5  # wall seconds granted for each second of processor time
REPLY_MARGIN = 10  # wall seconds beyond those, for the reply itself
PROGRAM = "from limbeck.tasks.sandbox_worker import serve; serve()"


class Sandbox:
    """One child process at the other end of a pipe; safe to share between threads, and across a fork.

    `program` is the child's Python code.
    """

    def __init__(self, program: str = PROGRAM) -> None:
        self.program = program
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._proof: Proof | None = None

    def ask(self, judge: str, *question: Any, answer: str, deadline: float) -> str:
        """The verdict of the judge of that name: `correct`, `wrong`, `unparsed`, `timeout` or `error`.

        `question` are the judge's JSON arguments; `deadline` is in seconds of processor time.
        """
        with self._lock:
            verdict = None
            try:
                child = self._child or self._start()
                _send(child, [judge, *question], answer, deadline)
                if _read_line(child, START_TIMEOUT) == "started":
                    verdict = _read_line(child, WALL_FACTOR * deadline + REPLY_MARGIN)
            except TimeoutError:
                return "timeout"
            except OSError:  # the child ended, or could not be started
                return "error"
            finally:
                if not verdict:  # also after Ctrl-C: a late reply must not answer the next question
                    self.close()
            return verdict or "error"

    def proof(self) -> Proof:
        """The accesses that a confined process attempted when the child started, and was refused."""
        with self._lock:
            if self._proof is None:
                try:
                    self._start()
                except OSError:
                    self.close()
            return self._proof or Proof(0, False, ())

    def _start(self) -> subprocess.Popen:
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", self.program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=_environment(),
            start_new_session=True,  # so that its forks end with it
        )
        report = _read_line(self._child, START_TIMEOUT)  # written before any answer is read
        landlock, seccomp, *refused = report.split("|")
        self._proof = Proof(int(landlock), seccomp == "True", tuple(refused))
        return self._child

    def close(self) -> None:
        """Kill the child, if there is one."""
        child = self._child
        self._child = None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.stdin.close()
        child.stdout.close()
        child.wait()


def _environment() -> dict[str, str]:
    """The variables that Python needs, and none of ours; one thread and one hash seed make verdicts
    reproducible."""
    package = str(Path(__file__).parents[2])
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, sys.path)])
    environment["PYTHONHASHSEED"] = "0"
    environment["OPENBLAS_NUM_THREADS"] = "1"
    environment["OMP_NUM_THREADS"] = "1"
    return environment


def _send(child: subprocess.Popen, question: list, answer: str, deadline: float) -> None:
    """Write a line of JSON, and the answer's bytes behind it."""
    body = answer.encode("utf-8", "surrogatepass")
    head = json.dumps({"question": question, "deadline": deadline, "answer": len(body)})
    child.stdin.write(head.encode() + b"\n")
    child.stdin.write(body)


def _read_line(child: subprocess.Popen, seconds: float) -> str:
    """One line from the child. Raises TimeoutError if it is late, OSError if the child has ended."""
    pipe = child.stdout.fileno()
    end = time.monotonic() + seconds
    text = b""
    while not text.endswith(b"\n"):
        remaining = max(0.0, end - time.monotonic())
        readable, _, _ = select.select([pipe], [], [], remaining)
        if not readable:
            raise TimeoutError(f"no reply in {seconds} seconds")
        byte = os.read(pipe, 1)
        if not byte:
            raise OSError(f"the child ended with {child.wait()}")
        text += byte
    return text.decode().strip()


SANDBOX = Sandbox()
atexit.register(SANDBOX.close)
# A forked process must neither write into its parent's pipe nor wait for its lock.
os.register_at_fork(after_in_child=SANDBOX.__init__)
