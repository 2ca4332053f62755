"""A sandbox for judges that could hang, crash, be exploited or exhaust memory: each verdict is computed in a
process of its own. A judge is a function that decides whether an answer is correct.

This module runs in the parent process, `sandbox_worker.py` in a child at the other end of a pipe. The child
loads the judges and never parses an answer: for each answer it forks a process that confines itself, judges
this one answer, returns the verdict as its exit code, and ends. Requests in the pipe are JSON written by this
package, followed by the answer as bytes.

Two timers are set before the answer is read: one of the process's own processor time, so that the load of the
machine does not change verdicts, and one of wall time. If both fail, the parent stops waiting and kills the
child.
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
    """A child process that judges answers, and the pipe to it. It may be shared between threads, and used
    after a fork.

    `program` is the Python code that the child runs.
    """

    def __init__(self, program: str = PROGRAM) -> None:
        self.program = program
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._proof: Proof | None = None

    def ask(self, judge: str, *question: Any, answer: str, deadline: float) -> str:
        """Return the verdict of the judge with the name `judge` on an answer: `correct`, `wrong`, `unparsed`,
        `timeout` or `error`.

        `question` are the judge's arguments, which are JSON values; `deadline` is in seconds of processor
        time.
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
        """Return which kinds of access were refused to a confined process when the child started; this is
        tested once. The child is started if needed."""
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
        """Kill the child process and the processes that it has forked, if it is running; the next `ask`
        starts another."""
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
    """Return the environment variables of the child: those that Python needs, and no others of this process.
    One thread and a fixed hash seed make verdicts reproducible."""
    package = str(Path(__file__).parents[2])
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, sys.path)])
    environment["PYTHONHASHSEED"] = "0"
    environment["OPENBLAS_NUM_THREADS"] = "1"
    environment["OMP_NUM_THREADS"] = "1"
    return environment


def _send(child: subprocess.Popen, question: list, answer: str, deadline: float) -> None:
    """Write a request to the child: a line of JSON, followed by the bytes of the answer."""
    body = answer.encode("utf-8", "surrogatepass")
    head = json.dumps({"question": question, "deadline": deadline, "answer": len(body)})
    child.stdin.write(head.encode() + b"\n")
    child.stdin.write(body)


def _read_line(child: subprocess.Popen, seconds: float) -> str:
    """Return the next line that the child writes. Raises TimeoutError if it is not complete within `seconds`,
    OSError if the child has ended."""
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
