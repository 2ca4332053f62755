"""A child process that may be killed: it judges what could hang, crash or eat the memory of a training run.

math-verify needs seconds and gigabytes for `5^5^5^5^5`, and its own time limit works in the main thread only;
several generators of reasoning-gym pass the answer to `eval`. Both therefore run here. This file is both
ends of the pipe: `ask` in the parent, `serve` in the child, which is started when it is first needed.

Two clocks: the child's counts its own processor time, so that a busy machine changes no verdict (and a child
whose parent was killed ends by itself); the parent's counts wall time and ends in SIGKILL.
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from typing import Any

MEMORY = 2 << 30  # bytes of address space
RECYCLE = 2000  # questions a child answers before a fresh one takes over: sympy's caches only grow
START = 60.0  # seconds of wall time to start Python and import a judge
PATIENCE = 5  # wall seconds granted for each second of processor time


class Referee:
    """One child at the other end of a pipe; safe to share between threads, and across a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._asked = 0

    def ask(self, judge: str, *question: Any, deadline: float) -> str:
        """`correct`, `wrong`, `unparsed`, `timeout` or `error`; `deadline` in seconds of processor time."""
        with self._lock:
            if self._asked >= RECYCLE:
                self.close()
            verdict = None
            try:
                child = self._child or self._start()
                self._asked += 1
                pickle.dump((judge, question, deadline), child.stdin)
                if _line(child, START) == "started":
                    verdict = _line(child, PATIENCE * deadline + 1)
            except TimeoutError:
                return "timeout"
            except OSError:  # the child went away, or could not be started
                return "error"
            finally:
                if not verdict:  # also after Ctrl-C: a late reply must not answer the next question
                    self.close()
            return verdict or "error"

    def _start(self) -> subprocess.Popen:
        # one thread and one hash seed: the same question gets the same answer
        environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        }
        self._child = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        self._asked = 0
        return self._child

    def close(self) -> None:
        """End the child, where there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.stdin.close()
        child.stdout.close()
        child.wait()


def _line(child: subprocess.Popen, seconds: float) -> str:
    """One line from the child; TimeoutError when it is late or was stopped by its own clock."""
    pipe, end, text = child.stdout.fileno(), time.monotonic() + seconds, b""
    while not text.endswith(b"\n"):
        if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError(f"no reply in {seconds} seconds")
        byte = os.read(pipe, 1)
        if not byte and child.wait() == -signal.SIGPROF:
            raise TimeoutError("stopped by its clock")
        if not byte:
            raise OSError(f"the child ended with {child.returncode}")
        text += byte
    return text.decode().strip()


# ---------------------------------------------------------------- in the child


def serve() -> None:
    """Answer questions until the pipe closes: `started`, then the verdict, each on a line."""
    import logging
    import resource

    logging.disable()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a judge prints is no verdict
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the kernel ends us, whatever C code is doing
    while True:
        try:
            name, question, deadline = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        judge = JUDGES[name]()
        replies.write("started\n")
        signal.setitimer(signal.ITIMER_PROF, deadline)
        try:
            verdict = judge(*question)
        except Exception:  # noqa: BLE001 — around model output, where anything happens
            verdict = "error"
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(f"{verdict}\n")


@lru_cache
def mathematics():
    """math-verify on two LaTeX strings; floats agree to 12 digits, so 1.41421356 is not the root of 2."""
    from math_verify import LatexExtractionConfig, parse, verify

    @lru_cache(maxsize=512)
    def read(latex: str) -> tuple:
        return tuple(parse(f"${latex}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None))

    def judge(gold: str, answer: str) -> str:
        wanted, given = list(read(gold)), list(read(answer))
        if not wanted or not given:
            return "unparsed"
        same = verify(wanted, given, float_rounding=12, timeout_seconds=None)
        return "correct" if same else "wrong"

    return judge


@lru_cache
def gym():
    """A reasoning-gym generator's own scorer; only full marks count, its partial ones pay for substrings."""
    from reasoning_gym.factory import create_dataset

    @lru_cache
    def dataset(name: str, config: bytes) -> Any:
        return create_dataset(name, **pickle.loads(config))

    def judge(name: str, config: bytes, entry: dict, answer: str) -> str:
        return "correct" if dataset(name, config).score_answer(answer, entry) >= 1.0 else "wrong"

    return judge


JUDGES = {"mathematics": mathematics, "gym": gym}  # each imports its library once, before the clock starts


if __name__ == "__main__":
    serve()
else:
    REFEREE = Referee()
    atexit.register(REFEREE.close)
    # a forked process must neither write into its parent's pipe nor wait for its lock
    os.register_at_fork(after_in_child=REFEREE.__init__)
