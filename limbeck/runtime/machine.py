"""This machine: its usable CPU cores and memory, and its description in a report."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")


def machine() -> dict[str, str | int | float]:
    """Return the description of this machine: processor, cores, free memory in bytes, operating system, and
    versions of Python and torch."""
    from importlib.metadata import version

    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": usable_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def usable_cores() -> float:
    """Return the number of CPU cores that this process may use: the cores in its affinity mask, or the quota
    of its control group if that is less."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _read_cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        return min(cores, int(quota[0]) / int(quota[1]))
    return cores


def usable_memory() -> int:
    """Return the bytes of memory that can still be allocated: the free memory, or the unused part of the
    control group's limit if that is less."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        kibibytes = fields["MemAvailable"].split()[0]
        free = int(kibibytes) * 1024
    limit = _read_cgroup("memory.max")
    used = _read_cgroup("memory.current")
    if limit.isdigit() and used.isdigit():
        return min(free, int(limit) - int(used))
    return free


def _read_cgroup(name: str) -> str:
    """Return the content of the file `name` of the control group, "" if it does not exist."""
    path = CGROUP / name
    return path.read_text().strip() if path.exists() else ""


def _processor() -> str:
    """Return the name of the processor."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
