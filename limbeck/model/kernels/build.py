"""The compiled kernels: made at first use where there is a C++ compiler, kept in the user's cache, never needed.

`LIMBECK_KERNELS=off` turns them off. `LIMBECK_MARCH` compiles them for fewer instructions than the processor has, such as
`x86-64-v3` for AVX2 without AVX-512: so every width can be tested and measured on one machine.
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
SETS = {16: "AVX-512", 8: "AVX2", 4: "NEON" if platform.machine().lower() in ("arm64", "aarch64") else "SSE2"}


def mode() -> str:
    """What `LIMBECK_KERNELS` asks for: `auto`, or `off` for plain torch.

    Raises:
        LimbeckError: it says something else.
    """
    asked = os.environ.get("LIMBECK_KERNELS", "").lower() or "auto"
    if asked not in MODES:
        raise LimbeckError(
            f"LIMBECK_KERNELS={asked}: say off for plain torch, or auto for whichever is faster"
        )
    return asked


def library() -> ctypes.CDLL | None:
    """The kernels; None without a compiler, without a BLAS to share with torch, or where `LIMBECK_KERNELS` is off."""
    return found()[0]


@cache
def found() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, and the path of their library or the reason why there are none."""
    if mode() == "off":
        return None, "turned off by LIMBECK_KERNELS"
    blas = sgemm()
    if blas is None:
        return None, "this torch has no sgemm_ to share"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return None, "no C++ compiler (c++, g++ or clang++)"
    try:
        path = compiled(compiler, march(compiler))
        kernels = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return (
            None,
            f"{compiler} could not make them: {output.strip().splitlines()[0] if output.strip() else error!r}",
        )
    kernels.use_sgemm(blas)
    return kernels, str(path)


def lanes() -> int:
    """Numbers of one vector, and cached positions of one block of keys."""
    return library().lanes()


def instructions() -> str:
    """The vector instructions that the kernels were compiled for: AVX-512, AVX2, NEON or SSE2; `none` without kernels."""
    return SETS[lanes()] if library() else "none"


def march(compiler: str) -> str:
    """The instruction set to compile for, as the compiler's option.

    Raises:
        LimbeckError: `LIMBECK_MARCH` names a set that the compiler does not know, or that this processor lacks.
    """
    native = "-mcpu=native" if SETS[4] == "NEON" else "-march=native"
    asked = os.environ.get("LIMBECK_MARCH", "native")
    if asked == "native":
        return native
    lacking = _features(compiler, f"-march={asked}") - _features(compiler, native)
    if lacking:
        raise LimbeckError(
            f"LIMBECK_MARCH={asked}: this processor has no {', '.join(sorted(lacking))}; leave it away, or name a smaller set"
        )
    return f"-march={asked}"


def _features(compiler: str, option: str) -> set[str]:
    """Instruction sets that an option turns on, by the names that compilers give them: `AVX2`, `FMA`, ..."""
    command = [compiler, option, "-dM", "-E", "-x", "c++", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if run.returncode:
        raise LimbeckError(
            f"{option}: {compiler} does not know it; set LIMBECK_MARCH to one it does, such as x86-64-v3"
        )
    names = {
        line.split()[1].strip("_")
        for line in run.stdout.splitlines()
        if line.startswith("#define __") and line.endswith("__ 1")
    }
    return {
        name for name in names if name.startswith(("AVX", "FMA", "SSE", "SSSE", "BMI", "F16C", "ARM_FEATURE"))
    }


def sgemm() -> ctypes.c_void_p | None:
    """BLAS's product of matrices, of the library that torch has loaded."""
    try:
        return ctypes.cast(
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).sgemm_, ctypes.c_void_p
        )
    except (OSError, AttributeError):
        return None


def folder() -> Path:
    """Where compiled kernels and what was measured of them are kept."""
    return Path(os.environ.get("LIMBECK_CACHE") or platformdirs.user_cache_dir("limbeck"))


def compiled(compiler: str, option: str) -> Path:
    """The shared library of this source, compiler and processor, made if it is not there yet."""
    made_by = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=True
    ).stdout
    source = "\0".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.iterdir()))
    key = hashlib.sha256("\0".join([source, *FLAGS, option, made_by, processor()]).encode()).hexdigest()[:16]
    folder().mkdir(parents=True, exist_ok=True)
    path = folder() / f"kernels-{key}.so"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder()) as work:
                fresh = Path(work) / path.name
                build(compiler, option, fresh)
                os.replace(fresh, path)
    return path


def build(compiler: str, option: str, path: Path) -> None:
    """Compile the kernels into `path`; CalledProcessError where the compiler fails, with its output."""
    # without this GCC halves vectors of 512 bits on some processors; it means nothing where there are none
    wide = ["-mprefer-vector-width=512"] if SETS[4] == "SSE2" else []
    command = [compiler, *FLAGS, option, *wide, str(SOURCE / "kernels.cpp"), "-o", str(path)]
    subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)


def processor() -> str:
    """What -march=native looks at: a home directory may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(
        next((line for line in lines if line.startswith(name)), "")
        for name in ("model name", "flags", "Features")
    )
