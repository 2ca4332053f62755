"""The compiled kernels: built at first use if there is a C++ compiler, and kept in the user's cache folder.

Without a compiler everything runs in plain torch. `LIMBECK_KERNELS=off` turns the kernels off.
`LIMBECK_MARCH` compiles them for a smaller instruction set than the processor's, such as `x86-64-v3` for AVX2
without AVX-512, so that all vector widths can be tested on one machine.
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
TURNED_OFF = "turned off by LIMBECK_KERNELS"
NO_BLAS = "this torch has no sgemm_ to share"
NO_COMPILER = "no C++ compiler (c++, g++ or clang++)"
ARM = platform.machine().lower() in ("arm64", "aarch64")
SETS = {16: "AVX-512", 8: "AVX2", 4: "NEON" if ARM else "SSE2"}  # by float32 numbers of a vector
# Instruction sets among the macros that compilers define, by the begin of their names.
FEATURES = ("AVX", "FMA", "SSE", "SSSE", "BMI", "F16C", "ARM_FEATURE")


def mode() -> str:
    """Return the value of the variable `LIMBECK_KERNELS`: `auto`, or `off` for plain torch.

    Raises:
        LimbeckError: the variable has another value.
    """
    value = os.environ.get("LIMBECK_KERNELS", "").lower() or "auto"
    if value not in MODES:
        raise LimbeckError(
            f"LIMBECK_KERNELS={value}: say off for plain torch, or auto for whichever is faster"
        )
    return value


def library() -> ctypes.CDLL | None:
    """Return the loaded kernels, or None if they are turned off or cannot be built.

    They need a C++ compiler and a torch whose BLAS they can call.
    """
    return found()[0]


@cache
def found() -> tuple[ctypes.CDLL | None, str]:
    """Return the loaded kernels and the path of their library, or None and the reason why there are none."""
    if mode() == "off":
        return None, TURNED_OFF
    blas = sgemm()
    if blas is None:
        return None, NO_BLAS
    compiler = _find_compiler()
    if compiler is None:
        return None, NO_COMPILER
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
    """Return the path of a C++ compiler: the one in the variable `CXX`, or the first known one; or None."""
    for name in (os.environ.get("CXX") or "c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return path
    return None


def lanes() -> int:
    """Return the number of float32 values in a vector register.

    This is also the number of cached positions in one block of keys.
    """
    return library().lanes()


def instructions() -> str:
    """Return the vector instructions of the kernels: AVX-512, AVX2, NEON, SSE2; `none` without kernels."""
    return SETS[lanes()] if library() else "none"


def march(compiler: str) -> str:
    """Return the compiler option that names the instruction set to compile for.

    Raises:
        LimbeckError: `LIMBECK_MARCH` names a set that the compiler does not know or this processor lacks.
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
    """Return the instruction sets of a compiler option, by their macros' names: `AVX2`, `FMA`, ..."""
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
    """Return the address of torch's float32 BLAS matrix product, or None if torch does not export it."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).sgemm_, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def folder() -> Path:
    """Return the folder of the compiled kernels and of their measured timings."""
    return Path(os.environ.get("LIMBECK_CACHE") or platformdirs.user_cache_dir("limbeck"))


def compiled(compiler: str, option: str) -> Path:
    """Return the path of the shared library for this source, compiler and processor; build it if missing."""
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
    """Compile the kernels into a shared library at `path`.

    `option` is the compiler option that names the instruction set.

    Raises:
        subprocess.CalledProcessError: the compiler failed; the error holds its output.
    """
    # without this GCC halves vectors of 512 bits on some processors; it has no effect where there are none
    wide = [] if ARM else ["-mprefer-vector-width=512"]
    command = [compiler, *FLAGS, option, *wide, str(SOURCE / "kernels.cpp"), "-o", str(path)]
    subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)


def processor() -> str:
    """Return the model and the features of the processor, on which the result of -march=native depends.

    They are part of the library's name, as different machines may share one home directory.
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
