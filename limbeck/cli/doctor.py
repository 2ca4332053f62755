"""What this machine has and lacks, and what to do about it. Nothing here needs the network."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..model.config import ModelConfig
from ..runtime.machine import usable_cores, usable_memory
from ..tasks.sandbox import SANDBOX

GIB = 1024**3

# Weights, gradients and AdamW's two moments, four bytes each (Rajbhandari et al. 2020, section 3.1, in fp32).
BYTES_PER_PARAMETER = 16

# Tokens in the cache at once: 64 rollouts of 1,024 tokens.
CACHED_TOKENS = 64 * 1024

# family, vocabulary, hidden, layers, heads, key/value heads, head size, intermediate
SIZES = {
    "SmolLM2-135M": ("llama", 49152, 576, 30, 9, 3, 64, 1536),
    "SmolLM2-360M": ("llama", 49152, 960, 32, 15, 5, 64, 2560),
    "Qwen3-0.6B": ("qwen3", 151936, 1024, 28, 16, 8, 128, 3072),
    "Qwen3-1.7B": ("qwen3", 151936, 2048, 28, 16, 8, 128, 6144),
    "Qwen3-4B": ("qwen3", 151936, 2560, 36, 32, 8, 128, 9728),
}

EXTRAS = {
    "reasoning_gym": ("gym", "generated tasks"),
    "huggingface_hub": ("hub", "limbeck pull hf:OWNER/NAME"),
    "ray": ("scale", "runs on several machines"),
    "fastapi": ("serve", "the chat page and the API"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `ok` is None where it is neither good nor bad.

    `Finding("reasoning_gym", ok=None, value="not installed", advice="pip install 'limbeck[gym]'")`
    """

    name: str
    ok: bool | None
    value: str
    advice: str = ""
    table: tuple[dict[str, Any], ...] = ()  # details, a row each


def examine(runs: Path = Path("runs"), measure: bool = False) -> list[Finding]:
    """Look at the machine; about two seconds, most of them torch's. `runs` is where artifacts will go; with `measure` the
    kernels are timed anew."""
    memory = usable_memory()
    return [
        _python(),
        _cores(),
        _memory(memory),
        _disk(runs),
        *_torch(),
        _kernels(measure),
        _sandbox(),
        *(_extra(module) for module in EXTRAS),
        _sizes(memory),
        Finding("network", None, "not needed", "only limbeck pull and remote teachers use it"),
    ]


def _python() -> Finding:
    recent = sys.version_info >= (3, 11)
    return Finding("python", recent, platform.python_version(), "" if recent else "use 3.11 or later")


def _cores() -> Finding:
    cores = usable_cores()
    advice = "" if cores >= 2 else "runs work on one core, in twice the time"
    return Finding("cores", not advice, f"{cores:g}", advice)


def _memory(free: int) -> Finding:
    advice = "" if free >= 2 * GIB else "the quickstart needs 2 GiB: close other programs"
    return Finding("memory", free >= 2 * GIB, f"{free / GIB:.1f} GiB usable", advice)


def _disk(runs: Path) -> Finding:
    place = next(p for p in (runs.absolute(), *runs.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    advice = "" if writable else f"{place} cannot be written to: choose another folder"
    if writable and free < 5 * GIB:
        advice = "a run of a 135M model keeps about 5 GiB of checkpoints: free some, or use limbeck gc"
    return Finding("disk", not advice, f"{free / GIB:.0f} GiB free at {place}", advice)


def _kernels(measure: bool = False) -> Finding:
    from ..model import kernels

    if measure:
        kernels.forget()
    library, place = kernels.found()
    if library is not None:
        table = tuple(asdict(timing) for timing in kernels.timings())
        used = sum(row["used"] != "torch" for row in table)
        return Finding(
            "kernels",
            True,
            f"{kernels.instructions()}, used for {used} of {len(table)} kinds of work; in {place}",
            table=table,
        )
    off = (
        "LIMBECK_KERNELS=auto turns them on"
        if kernels.mode() == "off"
        else "a C++ compiler makes training and sampling faster: apt install g++"
    )
    return Finding("kernels", None, f"none: {place}", off)


def _torch() -> list[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    slow = "no vector instructions were found: expect a tenth of the speed" if capability == "DEFAULT" else ""
    threads, cores = torch.get_num_threads(), usable_cores()
    fewer = f"more threads than cores: set OMP_NUM_THREADS={max(1, int(cores))}"
    crowded = fewer if threads > cores + 1 else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; every stage runs on the CPU"
    return [
        Finding("torch", True, torch.__version__),
        Finding("instructions", not slow, capability, slow),
        Finding("threads", not crowded, str(threads), crowded),
        Finding("speed", None, f"{matrix_speed():.0f} GFLOP/s in matrix products (fp32)"),
        Finding("gpu", None, gpu),
    ]


def matrix_speed(seconds: float = 1.0, size: int = 1024) -> float:
    """GFLOP/s of fp32 matrix products, the median over about `seconds`."""
    import torch

    a, times = torch.ones(size, size), []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / sorted(times)[len(times) // 2] / 1e9


def _sandbox() -> Finding:
    """What a process that judges answers tried to reach just now, and was refused."""
    proof = SANDBOX.proof()
    advice = (
        ""
        if proof.holds
        else "tasks whose scorers need it are refused: use Linux with seccomp (Docker's default profile allows it)"
    )
    return Finding("sandbox", proof.holds, str(proof), advice)


def _extra(module: str) -> Finding:
    extra, purpose = EXTRAS[module]
    if importlib.util.find_spec(module):
        return Finding(module, True, "installed")
    return Finding(module, None, "not installed", f"for {purpose}: pip install 'limbeck[{extra}]'")


def _sizes(memory: int) -> Finding:
    """Which well-known models fit for reinforcement learning, by weights, AdamW and the rollouts' cache."""
    needs = {name: reinforcement_bytes(ModelConfig(*shape)) for name, shape in SIZES.items()}
    fit = [f"{name} ({need / GIB:.0f} GiB)" for name, need in needs.items() if need <= memory]
    if not fit:
        smallest = f"SmolLM2-135M needs {needs['SmolLM2-135M'] / GIB:.0f} GiB"
        return Finding("models", True, "the quickstart's", smallest)
    return Finding("models", True, "fit for RL: " + ", ".join(fit))


def reinforcement_bytes(config: ModelConfig) -> int:
    return BYTES_PER_PARAMETER * config.parameters + CACHED_TOKENS * config.kv_bytes_per_token()
