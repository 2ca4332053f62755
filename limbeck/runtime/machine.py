"""This machine: its cores, its memory, and what a report says about it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def machine() -> dict[str, str | int | float]:
    """What a report says about where it was made."""
    from importlib.metadata import version

    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_bytes": usable_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def usable_cores() -> float:
    """Cores this process may run on: its affinity, or its control group's quota if that is less."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        return min(len(affinity), int(quota[0]) / int(quota[1]))
    return len(affinity)


def usable_memory() -> int:
    """Bytes that can still be taken: what the system has free, or what the control group leaves if less."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _cgroup(name: str) -> str:
    path = CGROUP / name
    return path.read_text().strip() if path.exists() else ""


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
