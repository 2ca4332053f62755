"""What a process may reach, taken away by the kernel from inside: Landlock for files, seccomp for everything else.

`confine` leaves a process its memory and its clocks: no file can be opened, no connection made, no program or
process started, no signal sent, and none of it comes back. `attempt` tries all of that, so that what holds is
known and not believed. Landlock: linux/landlock.h; seccomp: linux/seccomp.h and linux/filter.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass

NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2  # prctl
CREATE_RULESET, RESTRICT_SELF = 444, 446  # Landlock's calls, the same on every architecture
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM  # what the filter answers

# What Python needs to compute with what it has loaded, and to end. All else is refused: what opens, connects,
# starts, signals; and what would stop the clocks or ignore them.
_X86_64 = {
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "gettimeofday": 96, "getrusage": 98, "times": 100,
    "gettid": 186, "time": 201, "futex": 202, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "getrandom": 318,
}  # fmt: skip
_AARCH64 = {
    "exit": 93, "exit_group": 94, "futex": 98, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114,
    "clock_nanosleep": 115, "sched_yield": 124, "restart_syscall": 128, "rt_sigreturn": 139, "times": 153,
    "getrusage": 165, "gettimeofday": 169, "getpid": 172, "gettid": 178, "brk": 214, "munmap": 215, "mremap": 216,
    "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
}  # fmt: skip
CALLS = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

REACHES = ("file read", "file written", "connection", "signal", "process", "program")


@dataclass(frozen=True)
class Proof:
    """What was tried and refused. `Proof(landlock=7, seccomp=True, refused=REACHES).holds` is True."""

    landlock: int  # the kernel's version of it, 0 where it was not applied
    seccomp: bool
    refused: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing can be reached."""
        return set(self.refused) == set(REACHES)

    @property
    def layers(self) -> str:
        """`Landlock 7 and seccomp`, or what of them was applied."""
        applied = [f"Landlock {self.landlock}"] * bool(self.landlock) + ["seccomp"] * self.seccomp
        return " and ".join(applied) or "neither Landlock nor seccomp"

    def __str__(self) -> str:
        if self.holds:
            return f"proven by trying: no {', no '.join(REACHES)} ({self.layers})"
        missing = ", ".join(reach for reach in REACHES if reach not in self.refused)
        return f"not refused: {missing} ({self.layers})"


# ---------------------------------------------------------------- taking away


def confine() -> tuple[int, bool]:
    """Take everything away from this process; the Landlock version that was applied, and whether seccomp was."""
    os.closerange(0, 4096)  # the child that forks has opened a handful
    libc = ctypes.CDLL(None, use_errno=True)
    willing = sys.platform.startswith("linux") and not libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    landlock = _landlock(libc) if willing else 0
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    return landlock, willing and _seccomp(libc)


def _landlock(libc: ctypes.CDLL) -> int:
    """A ruleset that handles all there is and allows none of it."""
    call = libc.syscall
    call.restype = ctypes.c_long
    version = call(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return 0
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    ports, scopes = 3 * (version >= 4), 3 * (version >= 6)
    attributes = struct.pack("QQQ", files, ports, scopes)[: 8 * (1 + (version >= 4) + (version >= 6))]
    ruleset = call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    applied = ruleset >= 0 and not call(RESTRICT_SELF, ctypes.c_int(ruleset), 0)
    if ruleset >= 0:
        os.close(ruleset)
    return version if applied else 0


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _seccomp(libc: ctypes.CDLL) -> bool:
    """Let the calls of this architecture's table through, and answer all others with EPERM."""
    if platform.machine() not in CALLS or sys.maxsize < 2**32:
        return False
    architecture, calls = CALLS[platform.machine()]
    load, equal, answer = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, REFUSE), (load, 0, 0, 0)]
    lines += [
        (equal, len(calls) - i, 0, number) for i, number in enumerate(calls.values())
    ]  # on to the last line
    lines += [(answer, 0, 0, REFUSE), (answer, 0, 0, ALLOW)]
    program = b"".join(struct.pack("HBBI", *line) for line in lines)
    return not libc.prctl(SECCOMP, FILTER, ctypes.byref(_Program(len(lines), program)), 0, 0)


# ---------------------------------------------------------------- trying


def attempt(parent: int) -> int:
    """Try each of REACHES, `signals` on the process `parent`; one bit for each that was refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    tries = (
        lambda: os.open(__file__, os.O_RDONLY),
        lambda: os.open(os.devnull, os.O_WRONLY),
        lambda: [_opened(libc.socket(family, kind, 0)) for family in (1, 2) for kind in (1, 2)],
        lambda: os.kill(parent, 0),
        lambda: os.fork() or os._exit(0),
        lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),  # ends with 0 where it succeeds
    )
    with contextlib.suppress(OSError, ValueError):  # a limit that can be lifted refuses nothing
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    return sum(1 << bit for bit, reach in enumerate(tries) if _refused(reach))


def _opened(descriptor: int) -> None:
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "no socket")


def _refused(reach: Callable) -> bool:
    try:
        reach()
    except OSError as error:
        return error.errno in (errno.EPERM, errno.EACCES, errno.EMFILE)
    return False
