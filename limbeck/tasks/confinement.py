"""Confinement of a process by the Linux kernel, applied from inside the process: Landlock for files, seccomp
for all other system calls.

After `confine` a process can only use its memory and read clocks: it can open no file, make no connection,
start no program or process, and send no signal, and it cannot undo any of this. `attempt` tries each of
these, to prove that the confinement works on this machine. Sources of the constants: linux/landlock.h,
linux/seccomp.h and linux/filter.h.
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

NO_NEW_PRIVILEGES = 38  # option of prctl
SECCOMP = 22  # option of prctl
FILTER = 2  # mode of seccomp
CREATE_RULESET = 444  # system call of Landlock, the same on every architecture
RESTRICT_SELF = 446  # system call of Landlock, the same on every architecture
ALLOW = 0x7FFF0000  # result of the filter
REFUSE = 0x00050000 | errno.EPERM  # result of the filter
MAX_DESCRIPTORS = 4096  # file descriptors closed; the child has opened a handful

# Landlock's rights on files by version: 13 in the first, 16 from the fifth on.
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
ALL_FILE_RIGHTS = 16  # bits

# The calls that Python needs to compute with what is loaded, and to end. All others are refused: those that
# open, connect, start or signal; and those that would stop the clocks or ignore them.
_X86_64 = {
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigreturn": 15, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "gettimeofday": 96,
    "getrusage": 98, "times": 100, "gettid": 186, "time": 201, "futex": 202, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "getrandom": 318,
}  # fmt: skip
_AARCH64 = {
    "exit": 93, "exit_group": 94, "futex": 98, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114,
    "clock_nanosleep": 115, "sched_yield": 124, "restart_syscall": 128, "rt_sigreturn": 139, "times": 153,
    "getrusage": 165, "gettimeofday": 169, "getpid": 172, "gettid": 178, "brk": 214, "munmap": 215,
    "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
}  # fmt: skip
CALLS = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

REACHES = ("file read", "file written", "connection", "signal", "process", "program")


@dataclass(frozen=True)
class Proof:
    """The kinds of access that a confined process attempted and was refused (`refused`). For example,
    `Proof(landlock=7, seccomp=True, refused=REACHES).holds` is True."""

    landlock: int  # version of Landlock that was applied, 0 for none
    seccomp: bool
    refused: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """True if every kind of access in `REACHES` was refused."""
        return set(self.refused) == set(REACHES)

    @property
    def layers(self) -> str:
        """A text that names what was applied, such as `Landlock 7 and seccomp`."""
        applied = []
        if self.landlock:
            applied.append(f"Landlock {self.landlock}")
        if self.seccomp:
            applied.append("seccomp")
        return " and ".join(applied) or "neither Landlock nor seccomp"

    def __str__(self) -> str:
        if self.holds:
            return f"proven by trying: no {', no '.join(REACHES)} ({self.layers})"
        missing = ", ".join(reach for reach in REACHES if reach not in self.refused)
        return f"not refused: {missing} ({self.layers})"


# ---------------------------------------------------------------- confining


def confine() -> tuple[int, bool]:
    """Take away all access from this process, irrevocably. Returns the version of Landlock that was applied
    (0 if none), and True if seccomp was applied."""
    os.closerange(0, MAX_DESCRIPTORS)
    libc = ctypes.CDLL(None, use_errno=True)
    supported = sys.platform.startswith("linux") and not libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    landlock = _landlock(libc) if supported else 0
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    return landlock, supported and _seccomp(libc)


def _landlock(libc: ctypes.CDLL) -> int:
    """Apply a Landlock ruleset that covers all rights and grants none of them. Returns Landlock's version, or
    0 if the ruleset was not applied."""
    call = libc.syscall
    call.restype = ctypes.c_long
    version = call(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return 0
    rights = [(1 << FILE_RIGHTS.get(version, ALL_FILE_RIGHTS)) - 1]
    if version >= 4:
        rights.append(3)  # TCP: bind and connect
    if version >= 6:
        rights.append(3)  # scopes: abstract sockets and signals
    attributes = struct.pack("Q" * len(rights), *rights)
    ruleset = call(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return 0
    failed = call(RESTRICT_SELF, ctypes.c_int(ruleset), 0)
    os.close(ruleset)
    return 0 if failed else version


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _seccomp(libc: ctypes.CDLL) -> bool:
    """Apply a seccomp filter that allows the system calls in this architecture's table and fails all others
    with EPERM. Returns True if it was applied."""
    if platform.machine() not in CALLS or sys.maxsize < 2**32:
        return False
    architecture, calls = CALLS[platform.machine()]
    load = 0x20  # BPF: load a word
    equal = 0x15  # BPF: jump if equal
    answer = 0x06  # BPF: return
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, REFUSE), (load, 0, 0, 0)]
    for i, number in enumerate(calls.values()):
        lines.append((equal, len(calls) - i, 0, number))  # jump to the last line
    lines += [(answer, 0, 0, REFUSE), (answer, 0, 0, ALLOW)]
    instructions = b"".join(struct.pack("HBBI", *line) for line in lines)
    program = _Program(len(lines), instructions)
    return not libc.prctl(SECCOMP, FILTER, ctypes.byref(program), 0, 0)


# ---------------------------------------------------------------- attempting


def attempt(parent: int) -> int:
    """Attempt each kind of access in `REACHES`; the signal goes to the process with the id `parent`. Returns
    an integer in which bit i is set if access i was refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    attempts = (
        lambda: os.open(__file__, os.O_RDONLY),
        lambda: os.open(os.devnull, os.O_WRONLY),
        lambda: _open_sockets(libc),
        lambda: os.kill(parent, 0),
        lambda: os.fork() or os._exit(0),
        lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),  # exits with 0 if it succeeds
    )
    with contextlib.suppress(OSError, ValueError):  # a limit that can be raised refuses nothing
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    return sum(1 << bit for bit, reach in enumerate(attempts) if _is_refused(reach))


def _open_sockets(libc: ctypes.CDLL) -> None:
    """Open a stream and a datagram socket of the Unix and the internet families. Raises OSError at the first
    that fails."""
    for family in (1, 2):
        for kind in (1, 2):
            if libc.socket(family, kind, 0) < 0:
                raise OSError(ctypes.get_errno(), "no socket")


def _is_refused(reach: Callable) -> bool:
    try:
        reach()
    except OSError as error:
        return error.errno in (errno.EPERM, errno.EACCES, errno.EMFILE)
    return False
