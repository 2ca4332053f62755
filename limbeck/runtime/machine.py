"""This machine: its cores, its memory, and its description in a report."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")


def machine() -> dict[str, str | int | float]:
    """The description of the machine in a report."""
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
    """Cores that this process may run on: its affinity, or its control group's quota if that is less."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _read_cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        return min(cores, int(quota[0]) / int(quota[1]))
    return cores


def usable_memory() -> int:
    """Bytes that can still be allocated: free memory, or the rest of the control group's limit."""
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
    """The value of a file of the control group, "" if there is none."""
    path = CGROUP / name
    return path.read_text().strip() if path.exists() else ""


def _processor() -> str:
    """The processor's name."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
