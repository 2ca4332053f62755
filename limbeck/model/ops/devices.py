"""The devices of this machine by the names that commands take, and what a process sets before it uses a card.

`cpu`, `mps`, and `cuda:0`, `cuda:1` and so on for NVIDIA cards. `plain` is the CPU with the engine of a card
and with torch's operations, for tests.
"""

from __future__ import annotations

import gc
import os
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...types import LimbeckError

PLAIN = "plain"
NAMES = re.compile(r"auto|cpu|plain|mps|cuda(:\d+)?")
CAPABILITY = (8, 0)  # the least that the kernels need: Ampere, the first cards with bfloat16
DRIVER = Path("/proc/driver/nvidia/version")


def resolve(name: str) -> str:
    """Return the device that a name means, such as `cuda:0` for `auto` where torch sees a card that serves.

    Raises:
        LimbeckError: there is no such device here. The sentence says which there are.
    """
    if not NAMES.fullmatch(name):
        raise LimbeckError(f"--device {name}: not a device; choose auto, cpu, cuda, cuda:1 or mps")
    if name == "auto":
        return next((f"cuda:{i}" for i in range(_count()) if _serves(i)), "cpu")
    if name.startswith("cuda"):
        return _card(name)
    if name == "mps" and not torch.backends.mps.is_available():
        raise LimbeckError(f"--device mps: torch sees no Apple GPU; {_available()}")
    return name


def torch_device(name: str) -> torch.device:
    """Return the device that the tensors of a resolved name lie on."""
    return torch.device("cpu" if name == PLAIN else name)


def is_card(name: str) -> bool:
    """Return True if a resolved name is that of an NVIDIA card."""
    return name.startswith("cuda")


def _card(name: str) -> str:
    """Return the name of a card with its number; `cuda` is the first one."""
    number = int(name.partition(":")[2] or 0)
    if torch.version.cuda is None:
        raise LimbeckError(
            f"--device {name}: this torch ({torch.__version__}) is built without CUDA; on Linux "
            "`pip install --force-reinstall torch --index-url https://pypi.org/simple` brings the build "
            "for NVIDIA cards"
        )
    if number >= _count():
        raise LimbeckError(f"--device {name}: torch sees no such card; {_available()}")
    if not _serves(number):
        have = ".".join(map(str, torch.cuda.get_device_capability(number)))
        raise LimbeckError(
            f"--device {name}: {torch.cuda.get_device_name(number)} has compute capability {have}, and the "
            "kernels need 8.0 (Ampere) or later; take --device cpu"
        )
    return f"cuda:{number}"


def _count() -> int:
    """Return the number of cards that torch sees."""
    return torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0


def _serves(number: int) -> bool:
    """Return True if the kernels run on a card."""
    return torch.cuda.get_device_capability(number) >= CAPABILITY


def _available() -> str:
    """Return the devices of this machine as the end of a sentence."""
    names = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return f"there is {', '.join([*names, 'cpu'])}"


# ---------------------------------------------------------------- what a card is


def describe(name: str) -> dict[str, Any]:
    """Return what decides the bits of results on a device that is not the CPU: its kind and its software.

    The name of the card is without its number: two cards of a kind compute the same.
    """
    if not is_card(name):
        return {"name": name, "torch": torch.__version__}
    triton = None
    with suppress(PackageNotFoundError):
        triton = version("triton")
    card = torch.cuda.get_device_properties(name)
    return {
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "driver": driver(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
    }


def driver() -> str | None:
    """Return the version of NVIDIA's driver, None if the system does not tell."""
    with suppress(OSError):
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER.read_text(encoding="utf-8"))
        return found and found[1]
    return None


def identity(name: str) -> str:
    """Return what tells a card from every other one of this machine, for the name of its lock."""
    uuid = getattr(torch.cuda.get_device_properties(name), "uuid", None)
    return str(uuid or name.replace(":", "-"))


def cards() -> list[dict[str, Any]]:
    """Return the description of each card that torch sees, with its device's name and whether it serves."""
    return [
        {
            "device": f"cuda:{i}",
            "serves": _serves(i),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
            **describe(f"cuda:{i}"),
        }
        for i in range(_count())
    ]


# ---------------------------------------------------------------- settings of a process


def prepare(name: str) -> None:
    """Make results on a card repeatable in this process: the deterministic kernels of torch, and products of
    float32 in float32. Nothing is set for other devices.

    torch's filling of new memory is turned off, which it would do for every `empty` otherwise. cuBLAS reads
    its setting when the process first uses it. The card that is used by default is set for this thread only.
    """
    if not is_card(name):
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(name)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def release() -> None:
    """Give the memory that torch keeps of a card back to it, if this process has used one."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def host_buffer(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory of the host for `count` numbers that a device copies from and to: pinned for a card."""
    return torch.empty(count, dtype=dtype, pin_memory=is_card(str(device)))


def peak_bytes(name: str) -> int:
    """Return the most bytes of a card that this process had in use since `release`."""
    return torch.cuda.max_memory_allocated(name)


def out_of_memory(error: BaseException | None) -> bool:
    """Return True if a full card caused the error; chained errors are searched too."""
    while error:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def shortage(error: BaseException) -> str:
    """Return what was asked of a card's full memory and what there was, from torch's error, in words."""
    message = str(error)
    asked = re.search(r"allocate ([\d.]+ \w+)", message)
    total = re.search(r"capacity of ([\d.]+ \w+)", message)
    free = re.search(r"of which ([\d.]+ \w+) is free", message)
    if not (asked and total and free):
        return "the card's memory is full"
    return f"the card's memory is full: {asked[1]} more were asked for, of {total[1]} only {free[1]} are free"


def poisoned(error: BaseException | None) -> bool:
    """Return True if the error leaves this process unable to use its card: an error of a kernel or of the
    driver, after which every further call fails as well."""
    while error:
        broken = isinstance(error, getattr(torch, "AcceleratorError", ()))
        if broken or (isinstance(error, RuntimeError) and str(error).startswith("CUDA error")):
            return True
        error = error.__cause__ or error.__context__
    return False
