"""The checks of `limbeck doctor`: findings on this machine's software, memory, kernels and sandbox, with
advice.

No check uses the network.
"""

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

GIB = 1024**3  # bytes
BYTES_PER_PARAMETER = 16  # bytes: weights, gradients, AdamW's moments in fp32 (arXiv 1910.02054, section 3.1)
CACHED_TOKENS = 64 * 1024  # tokens in the KV cache at once: 64 rollouts of 1,024 tokens

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
    "openai": ("remote", "teachers and judges behind an API"),
}
COMPILERS = {
    "apt": "sudo apt install g++",
    "dnf": "sudo dnf install gcc-c++",
    "pacman": "sudo pacman -S gcc",
    "xcode-select": "xcode-select --install",
}  # the command that installs a C++ compiler, by the program that a system has for it
CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Finding:
    """One property of the machine: its name, its value as text, and advice where something can be
    improved.

    `ok` is None for a property that is neither good nor bad, such as an optional package that is missing:
    `Finding("reasoning_gym", ok=None, value="not installed", advice="pip install 'limbeck[gym]'")`
    """

    name: str
    ok: bool | None
    value: str
    advice: str = ""
    table: tuple[dict[str, Any], ...] = ()  # details, a row each


def examine(runs: Path = Path("runs"), measure: bool = False) -> list[Finding]:
    """Return all findings on this machine. This takes about two seconds, most of them for torch.

    `runs` is the folder of the artifacts, whose free disk space is checked. With `measure` the kept timings
    of the compiled kernels are dropped and measured again.
    """
    memory = usable_memory()
    return [
        _python(),
        _cores(),
        _memory(memory),
        _disk(runs),
        *_torch(),
        _kernels(measure),
        _sandbox(),
        *map(_extra, EXTRAS),
        _sizes(memory),
        Finding("network", None, "not needed", "only limbeck pull and remote teachers use it"),
    ]


def _python() -> Finding:
    """Return the finding on Python's version: is it recent enough?"""
    is_recent = sys.version_info >= (3, 11)
    advice = "" if is_recent else "use 3.11 or later"
    return Finding("python", is_recent, platform.python_version(), advice)


def _cores() -> Finding:
    """Return the finding on the number of processor cores that this process may use."""
    cores = usable_cores()
    advice = "" if cores >= 2 else "runs work on one core, in twice the time"
    return Finding("cores", not advice, f"{cores:g}", advice)


def _memory(free: int) -> Finding:
    """Return the finding on memory. `free` is the usable memory in bytes."""
    advice = "" if free >= 2 * GIB else "the quickstart needs 2 GiB: close other programs"
    return Finding("memory", not advice, f"{free / GIB:.1f} GiB usable", advice)


def _disk(runs: Path) -> Finding:
    """Return the finding on the disk of `runs`: is the folder writable, and is there enough free space for
    artifacts?
    """
    path = runs.absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    advice = ""
    if not os.access(path, os.W_OK):
        advice = f"{path} cannot be written to: choose another folder"
    elif free < 5 * GIB:
        advice = "a run of a 135M model keeps about 5 GiB of checkpoints: free some, or use limbeck gc"
    return Finding("disk", not advice, f"{free / GIB:.0f} GiB free at {path}", advice)


def _kernels(measure: bool = False) -> Finding:
    """Return the finding on the compiled kernels, with a table of their times beside torch's.

    With `measure` the times are measured again.
    """
    from ..model import kernels

    if measure:
        kernels.forget()
    library, place = kernels.found()
    if library is None:
        return Finding("kernels", None, f"none: {place}", _kernel_advice(place))
    table = tuple(asdict(timing) for timing in kernels.timings())
    used = sum(row["used"] != "torch" for row in table)
    value = f"{kernels.instructions()}, used for {used} of {len(table)} kinds of work; in {place}"
    return Finding("kernels", True, value, table=table)


def _kernel_advice(reason: str) -> str:
    """Return what to type where there are no kernels for the `reason` that `build.found` gives."""
    from ..model.kernels import build

    if reason == build.TURNED_OFF:
        return "the environment variable is off, so everything is slower: unset LIMBECK_KERNELS"
    if reason == build.NO_BLAS:
        return f"the CPU build of torch has it: {CPU_TORCH}"
    if reason == build.NO_COMPILER:
        commands = [command for program, command in COMPILERS.items() if shutil.which(program)]
        return f"training and sampling are faster with one: {(commands or list(COMPILERS.values()))[0]}"
    return "try another compiler: CXX=clang++ limbeck doctor; or fewer instructions: LIMBECK_MARCH=x86-64-v3"


def _torch() -> list[Finding]:
    """Return the findings on torch: its version, vector instructions, threads, speed and cards."""
    import torch

    return [
        Finding("torch", True, torch.__version__),
        _instructions(torch.backends.cpu.get_cpu_capability()),
        _threads(torch.get_num_threads()),
        Finding("speed", None, f"{matrix_speed():.0f} GFLOP/s in matrix products (fp32)"),
        *_cards(),
    ]


def _cards() -> list[Finding]:
    """Return a finding on each card: its memory and driver, and whether sampler and learner agree there."""
    from ..model.ops import devices

    cards = devices.cards()
    if not cards:
        return [Finding("gpu", None, "torch sees none; every stage runs on the CPU")]
    return [_card(card) for card in cards]


def _card(card: dict[str, Any]) -> Finding:
    """Return the finding on a card that `devices.cards` describes; one that serves is tried now."""
    name = card["device"]
    facts = f"{card['name']}, {card['memory_bytes'] / GIB:.1f} GiB"
    if card["driver"]:
        facts += f", driver {card['driver']}"
    if not card["serves"]:
        advice = (
            f"compute capability {card['capability']}, and the kernels need 8.0 or later: use --device cpu"
        )
        return Finding(name, None, facts, advice)
    from ..model.ops import devices
    from ..runtime.exactness import equal_share

    devices.prepare(name)
    share = equal_share(name)
    if share == 1:
        return Finding(name, True, f"{facts}; sampler and learner agree to the last bit")
    advice = "set exact: false in recipes for this card, and please report it"
    return Finding(name, False, f"{facts}; {share:.2%} of the tokens agree to the last bit", advice)


def _instructions(capability: str) -> Finding:
    """Return the finding on the processor's vector instructions.

    `capability` is torch's name for them, DEFAULT for none.
    """
    if capability == "DEFAULT":
        advice = "no vector instructions were found: expect a tenth of the speed"
        return Finding("instructions", False, capability, advice)
    return Finding("instructions", True, capability)


def _threads(threads: int) -> Finding:
    """Return the finding on the number of torch's threads: are there more than the processor has cores?"""
    cores = usable_cores()
    if threads > cores + 1:
        advice = f"more threads than cores: set OMP_NUM_THREADS={max(1, int(cores))}"
        return Finding("threads", False, str(threads), advice)
    return Finding("threads", True, str(threads))


def matrix_speed(seconds: float = 1.0, size: int = 1024) -> float:
    """Return the speed of fp32 products of two `size` x `size` matrices in GFLOP/s.

    It is the median of the products made in about `seconds` seconds.
    """
    import torch

    matrix = torch.ones(size, size)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    return 2 * size**3 / median / 1e9


def _sandbox() -> Finding:
    """Return the finding on the sandbox, in which the processes that score answers run.

    Forbidden accesses are tried now, and the finding says which were refused.
    """
    proof = SANDBOX.proof()
    if proof.holds:
        return Finding("sandbox", True, str(proof))
    advice = (
        "tasks whose scorers need it are refused: use Linux with seccomp (Docker's default profile allows it)"
    )
    return Finding("sandbox", False, str(proof), advice)


def _extra(module: str) -> Finding:
    """Return the finding on an optional package: is `module` installed, and if not, what is it for and how is
    it installed?
    """
    if importlib.util.find_spec(module):
        return Finding(module, True, "installed")
    extra, purpose = EXTRAS[module]
    return Finding(module, None, "not installed", f"for {purpose}: pip install 'limbeck[{extra}]'")


def _sizes(memory: int) -> Finding:
    """Return the finding on the well-known models that can be trained by RL in `memory` bytes, each with the
    memory that it needs.
    """
    needs = {name: reinforcement_bytes(ModelConfig(*shape)) for name, shape in SIZES.items()}
    fitting = [f"{name} ({need / GIB:.0f} GiB)" for name, need in needs.items() if need <= memory]
    if not fitting:
        smallest = needs["SmolLM2-135M"] / GIB
        return Finding("models", True, "the quickstart's", f"SmolLM2-135M needs {smallest:.0f} GiB")
    return Finding("models", True, "fit for RL: " + ", ".join(fitting))


def reinforcement_bytes(config: ModelConfig) -> int:
    """Return the bytes of memory that RL of a model needs: weights, gradients, AdamW's moments, and the KV
    cache of the rollouts.
    """
    return BYTES_PER_PARAMETER * config.parameters + CACHED_TOKENS * config.kv_bytes_per_token()
