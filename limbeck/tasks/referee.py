"""Verdicts from processes that reach nothing: judges of what could hang, crash, escape or eat a run's memory.

The parent's end of a pipe; `verdicts.py` is the other. The child loads the judges and never looks at an answer:
for each it forks a process, which confines itself, judges this one answer, tells the verdict by how it ends, and
leaves nothing behind. What crosses the pipe is JSON of our own, and the answer as bytes.

Two clocks, both set before the answer is read: the first counts the process's own time, so that a busy machine
changes no verdict, the second wall time. Where even they fail, the parent waits no longer and ends the child.
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

from .sandbox import Proof

START = 60.0  # seconds of wall time to start Python, or to import a judge
PATIENCE = 5  # wall seconds granted for each second of processor time
PROGRAM = "from limbeck.tasks.verdicts import serve; serve()"


class Referee:
    """One child at the other end of a pipe; safe to share between threads, and across a fork.

    `program` is what the child runs.
    """

    def __init__(self, program: str = PROGRAM) -> None:
        self.program = program
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._proof: Proof | None = None

    def ask(self, judge: str, *question: Any, answer: str, deadline: float) -> str:
        """`correct`, `wrong`, `unparsed`, `timeout` or `error`; `deadline` in seconds of processor time."""
        with self._lock:
            verdict = None
            try:
                child = self._child or self._start()
                _send(child, [judge, *question], answer, deadline)
                if _line(child, START) == "started":
                    verdict = _line(child, PATIENCE * deadline + 10)
            except TimeoutError:
                return "timeout"
            except OSError:  # the child went away, or could not be started
                return "error"
            finally:
                if not verdict:  # also after Ctrl-C: a late reply must not answer the next question
                    self.close()
            return verdict or "error"

    def proof(self) -> Proof:
        """What a process that judges tried to reach, when the child started, and was refused."""
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
            start_new_session=True,  # so that what it forked ends with it
        )
        landlock, seccomp, *refused = _line(self._child, START).split(
            "|"
        )  # from the child, before any answer
        self._proof = Proof(int(landlock), seccomp == "True", tuple(refused))
        return self._child

    def close(self) -> None:
        """End the child, where there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.stdin.close()
        child.stdout.close()
        child.wait()


def _environment() -> dict[str, str]:
    """What Python needs, and nothing of ours; one thread and one hash seed, so that verdicts are the same."""
    package = str(Path(__file__).parents[2])
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([package, *filter(None, sys.path)]),
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def _send(child: subprocess.Popen, question: list, answer: str, deadline: float) -> None:
    body = answer.encode("utf-8", "surrogatepass")
    head = json.dumps({"question": question, "deadline": deadline, "answer": len(body)})
    child.stdin.write(head.encode() + b"\n")
    child.stdin.write(body)


def _line(child: subprocess.Popen, seconds: float) -> str:
    """One line from the child; TimeoutError when it is late."""
    pipe, end, text = child.stdout.fileno(), time.monotonic() + seconds, b""
    while not text.endswith(b"\n"):
        if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError(f"no reply in {seconds} seconds")
        byte = os.read(pipe, 1)
        if not byte:
            raise OSError(f"the child ended with {child.wait()}")
        text += byte
    return text.decode().strip()


REFEREE = Referee()
atexit.register(REFEREE.close)
# a forked process must neither write into its parent's pipe nor wait for its lock
os.register_at_fork(after_in_child=REFEREE.__init__)
