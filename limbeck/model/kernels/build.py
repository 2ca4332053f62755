"""The compiled kernels: made at first use where there is a C++ compiler, stored in the user's cache, never
needed.

`LIMBECK_KERNELS=off` turns them off. `LIMBECK_MARCH` compiles them for fewer instructions than the processor
has, such as `x86-64-v3` for AVX2 without AVX-512, so that every width can be tested on one machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock

from ...types import LimbeckError

SOURCE = Path(__file__).with_name("source")
# Sums may be taken in any order; infinities and NaN keep their meaning, so this is not -ffast-math.
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math", "-ffp-contract=fast",
)  # fmt: skip
TIMEOUT = 300  # seconds for the compiler
MODES = ("off", "auto")
ARM = platform.machine().lower() in ("arm64", "aarch64")
SETS = {16: "AVX-512", 8: "AVX2", 4: "NEON" if ARM else "SSE2"}  # by float32 numbers of a vector
# Instruction sets among the macros that compilers define, by the begin of their names.
FEATURES = ("AVX", "FMA", "SSE", "SSSE", "BMI", "F16C", "ARM_FEATURE")


def mode() -> str:
    """The value of `LIMBECK_KERNELS`: `auto`, or `off` for plain torch.

    Raises:
        LimbeckError: it has another value.
    """
    value = os.environ.get("LIMBECK_KERNELS", "").lower() or "auto"
    if value not in MODES:
        raise LimbeckError(
            f"LIMBECK_KERNELS={value}: say off for plain torch, or auto for whichever is faster"
        )
    return value


def library() -> ctypes.CDLL | None:
    """The kernels; None without a compiler, without a BLAS to share with torch, or with them turned off."""
    return found()[0]


@cache
def found() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, and the path of their library or the reason why there are none."""
    if mode() == "off":
        return None, "turned off by LIMBECK_KERNELS"
    blas = sgemm()
    if blas is None:
        return None, "this torch has no sgemm_ to share"
    compiler = _find_compiler()
    if compiler is None:
        return None, "no C++ compiler (c++, g++ or clang++)"
    try:
        path = compiled(compiler, march(compiler))
        kernels = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip()
        reason = output.splitlines()[0] if output else repr(error)
        return None, f"{compiler} could not make them: {reason}"
    kernels.use_sgemm(blas)
    return kernels, str(path)


def _find_compiler() -> str | None:
    """The path of a C++ compiler: that of `CXX`, or the first known one."""
    for name in (os.environ.get("CXX") or "c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return path
    return None


def lanes() -> int:
    """Numbers of one vector, and cached positions of one block of keys."""
    return library().lanes()


def instructions() -> str:
    """The vector instructions that the kernels are compiled for: AVX-512, AVX2, NEON or SSE2; or `none`."""
    return SETS[lanes()] if library() else "none"


def march(compiler: str) -> str:
    """The instruction set to compile for, as the compiler's option.

    Raises: LimbeckError: `LIMBECK_MARCH` names a set that the compiler does not know, or that this processor
    lacks.
    """
    native = "-mcpu=native" if ARM else "-march=native"
    name = os.environ.get("LIMBECK_MARCH", "native")
    if name == "native":
        return native
    option = f"-march={name}"
    lacking = _features(compiler, option) - _features(compiler, native)
    if lacking:
        raise LimbeckError(
            f"LIMBECK_MARCH={name}: this processor has no {', '.join(sorted(lacking))}; "
            "leave it away, or name a smaller set"
        )
    return option


def _features(compiler: str, option: str) -> set[str]:
    """The instruction sets of an option, by the names that compilers give them: `AVX2`, `FMA`, ..."""
    command = [compiler, option, "-dM", "-E", "-x", "c++", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if run.returncode:
        raise LimbeckError(
            f"{option}: {compiler} does not know it; set LIMBECK_MARCH to one it does, such as x86-64-v3"
        )
    features = set()
    for line in run.stdout.splitlines():
        if line.startswith("#define __") and line.endswith("__ 1"):
            features.add(line.split()[1].strip("_"))
    return {name for name in features if name.startswith(FEATURES)}


def sgemm() -> ctypes.c_void_p | None:
    """The address of BLAS's matrix product in the library that torch has loaded; None if it has none."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).sgemm_, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def folder() -> Path:
    """The folder of compiled kernels and their timings."""
    return Path(os.environ.get("LIMBECK_CACHE") or platformdirs.user_cache_dir("limbeck"))


def compiled(compiler: str, option: str) -> Path:
    """The shared library of this source, compiler and processor, made if it is not there yet."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=True
    ).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.iterdir())]
    key = "\0".join([*sources, *FLAGS, option, version, processor()])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder().mkdir(parents=True, exist_ok=True)
    path = folder() / f"kernels-{digest}.so"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder()) as work:
                fresh = Path(work) / path.name
                build(compiler, option, fresh)
                os.replace(fresh, path)
    return path


def build(compiler: str, option: str, path: Path) -> None:
    """Compile the kernels into `path`.

    Raises:
        subprocess.CalledProcessError: the compiler fails; holds its output.
    """
    # without this GCC halves vectors of 512 bits on some processors; it has no effect where there are none
    wide = [] if ARM else ["-mprefer-vector-width=512"]
    command = [compiler, *FLAGS, option, *wide, str(SOURCE / "kernels.cpp"), "-o", str(path)]
    subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)


def processor() -> str:
    """Model and features of the processor, which -march=native follows.

    They are part of a library's name, as machines that differ may share a home directory.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    first = [
        next((line for line in lines if line.startswith(name)), "")
        for name in ("model name", "flags", "Features")
    ]
    return "\n".join(first)
